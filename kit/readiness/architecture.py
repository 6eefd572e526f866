"""`kit doctor` on the model's architecture: transformers, the GGUF converter and llama.cpp must each know it."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path

from kit.common.errors import KitError
from kit.gguf.setup import CONVERTER, converter_dir
from kit.readiness.probe import ask
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate

# transformers' tables of the models that generate text, keys are config.json's model_type.
TABLES = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
# A class of the converter: its decorators, and what is in it.
REGISTERED = re.compile(r"^@ModelBase\.register\((.*?)^class [^\n]*\n((?:(?:[ \t][^\n]*)?\n)*)",
                        re.MULTILINE | re.DOTALL)


def architecture(recipe: Recipe, folder: Path | None) -> Gate:
    """Whether config.json's architecture can be trained, converted and run with what is installed."""
    if folder is None or not (folder / "config.json").is_file():
        return Gate("architecture", None, "known once the model's config.json is on this disk")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, model_type = config["architectures"][0], config["model_type"]
    except (ValueError, KeyError, IndexError, TypeError):
        return Gate("architecture", False, str(folder / "config.json"),
                    detail="it names no architecture (`architectures`, `model_type`)", hint="fetch the model again")
    own_code = recipe.trust_remote_code and config.get("auto_map")
    if not own_code and model_type not in transformers_types():
        hint = "trust_remote_code: true runs the code that comes with it, if you trust its author" \
            if config.get("auto_map") else "a newer transformers, or another model"
        return Gate("architecture", False, name,
                    detail=f"transformers {version('transformers')} has no text model {model_type!r}", hint=hint)
    if not recipe.gguf:
        return Gate("architecture", True, f"{name}: transformers knows it (no GGUF is asked for)")
    converted = gguf_name(converter_dir(), name)
    if converted is None:
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
    folders = (package and package.submodule_search_locations) or []
    if not folders:
        raise KitError("transformers is not installed", "make setup")
    source = (Path(folders[0]) / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    tables = re.findall(rf"^(?:{'|'.join(TABLES)}) = .*?^\)", source, re.MULTILINE | re.DOTALL)
    return {model_type for table in tables for model_type in re.findall(r'\(\s*"([^"]+)",', table)}


def gguf_name(converter: Path, architecture: str) -> str | None:
    """The converter's GGUF name for an architecture: LlamaForCausalLM → llama; None where it knows none.

    Its classes are registered as `@ModelBase.register("LlamaForCausalLM", …)` and name a `gguf.MODEL_ARCH`, whose
    text stands in gguf-py's constants.py. Those of vision parts name MMPROJ.
    """
    constants = converter / "gguf-py" / "gguf" / "constants.py"
    if not constants.is_file():
        raise KitError(f"{converter} has no gguf-py, which its converter needs", "fetch llama.cpp whole, or unset "
                       "LLAMA_CPP_DIR to use the matching one")
    names = dict(re.findall(r"MODEL_ARCH\.(\w+)\s*:\s*\"([^\"]+)\"", constants.read_text(encoding="utf-8")))
    for file in (converter / CONVERTER, *sorted((converter / "conversion").glob("*.py"))):
        for decorators, body in REGISTERED.findall(file.read_text(encoding="utf-8")):
            member = re.search(r"^    model_arch = gguf\.MODEL_ARCH\.(\w+)", body, re.MULTILINE)
            if f'"{architecture}"' in decorators and member and member[1] != "MMPROJ":
                return names.get(member[1])
    return None

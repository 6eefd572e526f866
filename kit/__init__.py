"""Fine-tuning you can check: load → LoRA → format → SFT → stream → save, merge, GGUF.

The public names load on first use, so that `import kit` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

# OpenMP threads (torch, llama.cpp) spin while they wait. Spinning long starves whatever shares the cores, never
# spinning is slow on free ones; this is read when those libraries load, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "KitError": "errors",
    "GateError": "errors",
    "Recipe": "recipe",
    "Run": "runs",
    "Table": "show",
    "Tokens": "show",
    "about": "gates.provenance",
    "add_lora": "model",
    "answer": "infer",
    "answer_file": "answer_file",
    "check_gguf": "gguf_file",
    "check_trainer": "gates.first_step",
    "export_gguf": "gguf",
    "fix": "repair",
    "forecast": "forecast",
    "free_memory": "model",
    "lint": "lint",
    "load_data": "data",
    "load_model": "model",
    "load_tokenizer": "prompts",
    "machine": "platforms",
    "make_trainer": "train",
    "merge": "export",
    "model_label": "platforms",
    "preflight": "preflight",
    "push": "hub",
    "record": "gates.reference",
    "rehearse": "rehearsal",
    "reload": "model",
    "resolved": "model",
    "rows_of": "sources",
    "same_answers": "infer",
    "save_adapter": "export",
    "score": "score",
    "scores": "show",
    "seal": "gates.provenance",
    "show": "show",
    "side_by_side": "show",
    "size": "show",
    "stream": "infer",
    "template_kwargs": "prompts",
    "train": "train",
    "trainable_share": "model",
    "verify": "verify",
    "whole_model": "gather",
    "with_system": "prompts",
    "write_modelfile": "modelfile",
    "write_report": "report",
}

__all__ = sorted(_HOMES)


class _Kit(ModuleType):
    """Keeps `kit.train` the function: importing the module of that name would put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Kit


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kit.{_HOMES[name]}"), name)

"""Fine-tuning you can check: load → LoRA → format → SFT → stream → save, merge, GGUF.

The names that notebooks use; each loads its room on first use, so that `import kit` costs nothing.
"""

import importlib
import os
import sys
from typing import Any

# OpenMP threads (torch, llama.cpp) spin while they wait. Spinning long starves whatever shares the cores, never
# spinning is slow on free ones; this is read when those libraries load, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

importlib.import_module("kit.common.hosts")  # it sets the caches' places, which libraries read when they load

if "IPython" in sys.modules:
    importlib.import_module("kit.recipe.cells").watch()

_HOMES = {
    "KitError": "common.errors",
    "Recipe": "recipe.recipe",
    "Run": "runs.run",
    "Table": "common.show",
    "Tokens": "common.show",
    "about": "runs.provenance",
    "add_lora": "models.lora",
    "answer": "answering.prompts",
    "answer_file": "answering.answer_file",
    "check_trainer": "training.before_training",
    "export_gguf": "gguf.convert",
    "fix": "data.repair",
    "forecast": "readiness.forecast",
    "free_memory": "models.load",
    "install_packages": "common.packages",
    "lint": "data.lint",
    "load_data": "data.formatting",
    "load_model": "models.load",
    "load_tokenizer": "models.template",
    "machine": "recipe.machine",
    "make_trainer": "training.trainer",
    "merge": "export.adapter",
    "model_label": "models.fetch",
    "ollama_name": "runs.report",
    "preflight": "readiness.doctor",
    "push": "export.hub",
    "record": "verifying.reference",
    "rehearse": "readiness.rehearsal",
    "reload": "models.load",
    "resolved": "recipe.settings",
    "rows_of": "data.rows",
    "save_adapter": "export.adapter",
    "score": "answering.replies",
    "score_stages": "answering.replies",
    "scores": "common.show",
    "seal": "runs.provenance",
    "show": "common.show",
    "side_by_side": "common.show",
    "size": "common.show",
    "stream": "answering.engines",
    "template_kwargs": "models.template",
    "train": "training.train",
    "trainable_share": "models.lora",
    "verify": "verifying.verify",
    "whole_model": "training.train",
    "write_modelfile": "export.modelfile",
    "write_report": "runs.report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kit.{_HOMES[name]}"), name)

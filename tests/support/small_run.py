"""A run folder that was never trained, as far as a push looks at it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kit.common.files import write_json
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import seal
from kit.runs.run import Run, read_manifest


def small_run(folder: Path, starter: Path, **fields: Any) -> Run:
    """A sealed and verified run with an adapter of one small tensor."""
    import torch
    from safetensors.torch import save_file

    recipe = Recipe.load({}, run_name="cats", output_dir=str(folder), **fields)
    run = Run.of(recipe)
    run.adapter.mkdir(parents=True)
    (run.folder / "recipe.yaml").write_text(recipe.dump())
    save_file({"lora_A": torch.ones(64, 64)}, run.adapter / "adapter_model.safetensors")
    write_json(run.adapter / "adapter_config.json", {"r": 16, "base_model_name_or_path": str(starter)})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(starter / name, run.adapter / name)
    write_json(run.folder / "manifest.json", {})
    verified(run)
    return run


def verified(run: Run) -> None:
    seal(run)
    gates = Gates("verify")
    gates.check("parity adapter", True, "KL 0", "mean KL ≤ 0.0001")
    verdict(run, gates)


def verdict(run: Run, gates: Gates) -> None:
    write_json(run.folder / "verify.json", {"passed": gates.passed, "checked": "2026-11-21T00:00:00+0000",
                                            "gates": gates.as_json(),
                                            "artefacts": read_manifest(run.folder)["artefacts"]})

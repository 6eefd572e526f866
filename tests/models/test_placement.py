"""Where a saved model is read: on one GPU, on several, with what is left in the computer's memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kit.models import saved

pytestmark = pytest.mark.slow  # torch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of 15.2 GB in bfloat16, as a merged 7B is; the file is sparse."""
    size = 15_200_000_000
    header = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def cards(monkeypatch: pytest.MonkeyPatch, *free_gb: float, capability: tuple[int, int] = (7, 5)) -> None:
    import torch

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        is_available=lambda: bool(free_gb), device_count=lambda: len(free_gb),
        get_device_capability=lambda _: capability, mem_get_info=lambda number: (int(free_gb[number] * 1e9), 0)))


def test_a_7b_on_a_card_of_16_gb_leaves_layers_in_the_computers_memory(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    cards(monkeypatch, 15.0)
    options = saved.placement(folder)
    assert options["dtype"] is torch.float16, "a T4 has no bfloat16"
    assert options["device_map"] == "sequential" and set(options["max_memory"]) == {0, "cpu"}
    assert 0 < options["max_memory"][0] <= 12.5e9 < 15.2e9
    assert "the rest to the computer's memory" in capsys.readouterr().out
    cards(monkeypatch, 15.0, 15.0)
    options = saved.placement(folder)
    assert set(options["max_memory"]) == {0, 1, "cpu"} and "to 2 GPUs\n" in capsys.readouterr().out


def test_where_there_is_room_nothing_is_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, 40.0, 40.0, capability=(8, 0))
    assert saved.placement(folder) == {"dtype": "auto", "device_map": "cuda"}
    cards(monkeypatch)
    assert saved.placement(folder) == {"dtype": "auto", "device_map": "cpu"}
    cards(monkeypatch, 15.0)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    assert saved.placement(folder)["device_map"] == "cuda"


def test_layers_that_wait_are_shaken_too(tiny: Callable[..., Path]) -> None:
    """accelerate's own offload, with the CPU in the GPU's place: the same weights change by as much, and count."""
    import torch
    from accelerate import cpu_offload

    from kit.verifying import noise

    def logits(offloaded: bool, shaken: bool) -> torch.Tensor:
        model = saved.saved_model(tiny("qwen3", short=True), dtype=torch.float32)
        if offloaded:
            cpu_offload(model, execution_device=torch.device("cpu"))
            assert all(parameter.is_meta for parameter in model.parameters())
        if shaken:
            noise.shake(model)
        with torch.no_grad():
            return model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits

    assert torch.equal(logits(True, False), logits(False, False))
    assert torch.equal(logits(True, True), logits(False, True))
    assert not torch.equal(logits(True, True), logits(True, False))

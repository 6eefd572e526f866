"""A model that is still on its hub: what a run of it will need, told from sizes and headers, with nothing fetched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.common.weight_files import INDEX, read_weights_header
from kit.models import remote
from kit.models.fetch import MODEL_FILES, ModelFiles, fetched, local_model
from kit.models.remote import known_model, within
from kit.readiness import doctor, machine_checks
from kit.readiness.forecast import forecast_on
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from support import modelscope_stand_in
from support.command import PROJECT
from support.hub_stand_in import TOKEN, HubStandIn, serving, use

# As Qwen3's files have them: names, shapes and config of a small one.
CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
          "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
LAYERS = {f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in {
    "self_attn.q_proj": [128, 64], "self_attn.o_proj": [64, 128], "mlp.up_proj": [128, 64], "mlp.down_proj": [64, 128],
    "input_layernorm": [64]}.items()}
SHARDS = {"model-00001-of-00002.safetensors": LAYERS,
          "model-00002-of-00002.safetensors": {"model.embed_tokens.weight": [1000, 64], "model.norm.weight": [64]}}


def weights(path: Path, tensors: dict[str, list[int]], padding: int = 0) -> None:
    """A safetensors file of zeros in bfloat16; `padding` makes its header longer, as the format allows."""
    header: dict[str, Any] = {"__metadata__": {"padding": "x" * padding}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def model_files(folder: Path) -> Path:
    """The files of a model in two shards, and such as nobody fetches."""
    folder.mkdir(parents=True)
    for number, (name, tensors) in enumerate(SHARDS.items()):
        weights(folder / name, tensors, padding=number * 2 * remote.BEGINNING)
    places = {tensor: name for name, tensors in SHARDS.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "tokenizer.json").write_text("t" * 5000, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (folder / "README.md").write_text("r" * 7000, encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(bytes(9000))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_files(tmp_path / "source")


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving(tmp_path / "hub") as found:
        use(monkeypatch, found.url, TOKEN, tmp_path)
        found.hold("zoo/two-shards", source)
        yield found


def recipe(**fields: Any) -> Recipe:
    return Recipe.load({}, **{"model_name": "zoo/two-shards", **fields})


def to_fetch(source: Path, *without: str) -> int:
    return sum(path.stat().st_size for path in source.iterdir()
               if path.suffix in (".json", ".safetensors") and path.name not in without)


@pytest.mark.parametrize("ranges", [True, False])
def test_shapes_and_sizes_are_those_of_the_files(hub: HubStandIn, source: Path, tmp_path: Path, ranges: bool) -> None:
    """A header may be longer than what is asked for first; a mirror may give whole files where a part is asked for."""
    hub.without_ranges = not ranges
    told, there = known_model(recipe()), local_model(Recipe.load({}, model_name=str(source)))
    assert isinstance(told, ModelFiles) and isinstance(there, ModelFiles)
    assert (told.tensors, told.config, told.tokenizer_bytes) == (there.tensors, there.config, there.tokenizer_bytes)
    assert told.fetch_bytes == to_fetch(source) and there.fetch_bytes == 0
    assert not (tmp_path / "hub cache").exists(), "nothing is written"
    if ranges:
        starts = [read_weights_header(source / name).start for name in SHARDS]
        assert starts[0] < remote.BEGINNING < starts[1]
        assert sum(size for _, _, size in hub.given) < sum(starts) + 3 * remote.BEGINNING


def test_what_is_in_the_cache_is_not_fetched_again(hub: HubStandIn, source: Path) -> None:
    last = "model-00002-of-00002.safetensors"
    others = [kind for kind in MODEL_FILES if kind != "*.safetensors"]
    fetched("model_name", "zoo/two-shards", [*others, last], recipe())
    told = known_model(recipe())
    first = (source / "model-00001-of-00002.safetensors").stat().st_size
    assert isinstance(told, ModelFiles) and told.fetch_bytes == first
    fetched("model_name", "zoo/two-shards", MODEL_FILES, recipe())
    before = len(hub.given)
    whole = known_model(recipe())
    assert isinstance(whole, ModelFiles) and whole.fetch_bytes == 0 and len(hub.given) == before, "no hub is asked"


def test_a_private_model_is_asked_for_with_the_login(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    said = known_model(recipe())
    assert isinstance(said, str) and "zoo/two-shards is not on this disk, and the hub does not tell its size" in said


@pytest.mark.parametrize("fields, variables", [({"local_files_only": True}, {}), ({}, {"HF_HUB_OFFLINE": "1"})])
def test_offline_no_hub_is_asked(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any],
                                 variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hub.trouble["/"] = (500, "asked")
    said = known_model(recipe(**fields))
    assert said == "zoo/two-shards is not on this disk, and no hub may be asked: its size is not known"


@pytest.mark.parametrize("name, said", [("config.json", "holds no config.json"), (None, "404"),
                                        ("model-00001-of-00002.safetensors", "has no weights in safetensors, or not")])
def test_what_a_hub_lacks_is_named(hub: HubStandIn, name: str | None, said: str) -> None:
    if name:
        del hub.repositories["zoo/two-shards"].files[name]
    else:
        del hub.repositories["zoo/two-shards"]
    told = known_model(recipe())
    assert isinstance(told, str) and said in told


def test_a_hub_that_does_not_answer_costs_seconds(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN, Path("/nowhere"))
        monkeypatch.setattr(remote, "SECONDS", 0.5)
        began = time.monotonic()
        said = known_model(recipe())
        assert isinstance(said, str) and "no answer within" in said and time.monotonic() - began < 3
    monkeypatch.setattr(remote, "SECONDS", 5.0)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "does not tell its size" in str(known_model(recipe()))
    with pytest.raises(ZeroDivisionError):
        raise within(1, lambda: 1 // 0)


def test_doctor_and_preflight_say_the_disk_is_too_small(hub: HubStandIn, source: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3-4B with two GGUFs on Kaggle: about 23 GB at the peak where the folder has 20."""
    monkeypatch.setattr(doctor, "converter_dir", lambda: tmp_path)
    monkeypatch.setattr(machine_checks, "converter_dir", lambda: tmp_path)
    wanted = recipe(output_dir=str(tmp_path / "runs"), gguf=["q8_0", "q4_k_m"], save_minutes=None)
    needs = forecast_on(Machine("cuda", "a GPU", 2, 15.6, 1.0, False, ""), wanted, model=known_model(wanted))
    assert needs.room_gb is not None and needs.fetch_gb == pytest.approx(to_fetch(source) / 1e9, rel=1e-3)
    assert needs.memory_gb["weights"] > 0
    usage = shutil.disk_usage(tmp_path)
    peak = needs.room_gb + needs.fetch_gb
    for free, passed in ((0.97 * peak, False), (1.03 * peak, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=int(free * 1e9)))
        gate = machine_checks.disk(wanted, needs)
        assert gate.passed is passed and "the hub's cache" in gate.figure
        if passed:
            doctor.preflight(wanted)
        else:
            with pytest.raises(KitError, match=rf"too little disk: {peak:.2f} GB needed, .*the hub's cache") as caught:
                doctor.preflight(wanted)
            assert "merged" in caught.value.hint and "fetched" in caught.value.hint
    # What lies in the run's folder already is used again, or makes room.
    (tmp_path / "runs" / wanted.run_name / "merged").mkdir(parents=True)
    (tmp_path / "runs" / wanted.run_name / "merged" / "model.safetensors").write_bytes(bytes(10_000))
    [(_, _, room), _] = machine_checks.run_places(wanted, needs)
    assert room == pytest.approx(needs.room_gb - 1e-5)


def test_a_run_whose_model_cannot_be_asked_about_goes_on(hub: HubStandIn, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    doctor.preflight(recipe(local_files_only=True, gguf=[], output_dir=str(tmp_path)))
    assert capsys.readouterr().out == \
        "disk: not checked: zoo/two-shards is not on this disk, and no hub may be asked: its size is not known\n"


@pytest.mark.slow
def test_modelscope_tells_the_same(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelscope", reason="the package modelscope is optional")
    code = ("import json, sys; from kit.models.fetch import MODEL_FILES, fetched; "
            "from kit.models.remote import known_model; from kit.recipe.recipe import Recipe\n"
            "recipe = Recipe.load({}, hub='modelscope', model_name='zoo/two-shards')\n"
            "def told():\n    known = known_model(recipe); print(json.dumps([known.parameters, known.fetch_bytes]))\n"
            "told(); fetched('model_name', recipe.model_name, MODEL_FILES, recipe, hub='ModelScope'); told()")
    with modelscope_stand_in.serving() as hub:
        hub.hold("models", "zoo/two-shards", source)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={**os.environ, "MODELSCOPE_ENDPOINT": hub.url, "HOME": str(tmp_path),
                 "MODELSCOPE_HOME": str(tmp_path / "settings"), "MODELSCOPE_CACHE": str(tmp_path / "cache"),
                 "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])})
    there = local_model(Recipe.load({}, model_name=str(source)))
    assert isinstance(there, ModelFiles), there
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert said == [[there.parameters, to_fetch(source)], [there.parameters, 0]], done.stderr[-2000:]

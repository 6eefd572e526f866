"""Models and data from ModelScope, and pushing there: the real package against a stand-in on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.command import PROJECT
from support.modelscope_stand_in import PRIVATE, PUBLIC, TOKEN, USER, ModelScopeStandIn, serving
from support.small_run import small_run

pytest.importorskip("modelscope", reason="the package modelscope is optional")
pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[ModelScopeStandIn]:
    with serving() as found:
        yield found


def python(code: str, hub: ModelScopeStandIn, home: Path, *arguments: str, **environment: str) -> str:
    """What a fresh process prints: the package reads its settings when it is imported. A KitError is printed too."""
    program = "import sys\nfrom pathlib import Path\nfrom kit.common.errors import KitError\n" \
              "from kit.recipe.recipe import Recipe\n" \
              "try:\n" + "".join(f"    {line}\n" for line in code.splitlines()) + \
              "except KitError as error: print(f'{type(error).__name__}: {error}')"
    paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=home, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "MODELSCOPE_ENDPOINT": hub.url, "HOME": str(home),
                                            "MODELSCOPE_HOME": str(home / "settings"), "PYTHONPATH": paths,
                                            "MODELSCOPE_CACHE": str(home / "cache"), **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


NOBODY = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
FETCH = """from kit.models.fetch import model_folder
print(model_folder(Recipe.load({}, hub="modelscope", model_name="zoo/tiny", local_files_only=len(sys.argv) > 1)))"""
ROWS = """import json
from kit.data.rows import rows_of
recipe = Recipe.load(json.loads(sys.argv[1]), hub="modelscope")
for row in rows_of("zoo/talks", recipe): print(json.dumps([str(row.place), row.messages[-1]["content"], row.faults]))"""
PUSH = """from kit.export.hub import push
print(push(sys.argv[1], ["adapter"], private=sys.argv[2] == "private"))"""


def test_a_model_is_fetched_and_loads(hub: ModelScopeStandIn, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny("llama")
    hub.hold("models", "zoo/tiny", source)
    hub.files["models", "zoo/tiny"]["model.gguf"] = b"another format"
    folder = Path(python(FETCH, hub, tmp_path).splitlines()[-1])
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (folder / "model.gguf").exists()
    assert Path(python(FETCH, hub, tmp_path, "offline", **NOBODY).splitlines()[-1]) == folder
    ids = AutoTokenizer.from_pretrained(folder)("Where is my parcel?", return_tensors="pt")
    with torch.no_grad():
        found, own = (AutoModelForCausalLM.from_pretrained(place)(**ids).logits for place in (folder, source))
    assert torch.equal(found, own)


def test_a_model_that_is_not_there_is_told(hub: ModelScopeStandIn, tmp_path: Path) -> None:
    said = python(FETCH, hub, tmp_path)
    assert "KitError: model_name: zoo/tiny could not be fetched from ModelScope: " in said and "HF_ENDPOINT" in said
    assert "KitError: model_name: zoo/tiny could not be" in python(FETCH, hub, tmp_path, "offline", **NOBODY)


DOWNLOAD = """from kit.models.download import download
print(download(["zoo/tiny"], hub="modelscope", to=Path(sys.argv[1]) if len(sys.argv) > 1 else None)[0])"""


def test_a_download_is_checked_by_the_hubs_hashes(hub: ModelScopeStandIn, tmp_path: Path,
                                                  tiny: Callable[..., Path]) -> None:
    hub.hold("models", "zoo/tiny", tiny("qwen2", short=True))
    hub.files["models", "zoo/tiny"]["model.gguf"] = b"another format"
    for place in ([], [str(tmp_path / "模 型")]):
        said = python(DOWNLOAD, hub, tmp_path, *place).splitlines()
        folder, weights = Path(said[-1]), hub.files["models", "zoo/tiny"]["model.safetensors"]
        assert f"checked: 6 files, as {hub.url} names them" in said and not (folder / "model.gguf").exists()
        assert (folder / "model.safetensors").read_bytes() == weights
        (folder / "model.safetensors").resolve().write_bytes(b"x" + weights[1:])
        said = python(DOWNLOAD, hub, tmp_path, *place).splitlines()
        assert Path(said[-1]) == folder and (folder / "model.safetensors").read_bytes() == weights
        assert any("to fetch: 0 B" in line for line in said), "by its size it was there"


def test_a_download_that_fails_is_told(hub: ModelScopeStandIn, tmp_path: Path) -> None:
    assert "there is no such model" in python(DOWNLOAD, hub, tmp_path)
    said = python(DOWNLOAD, hub, tmp_path, **NOBODY)
    assert "the hub can't be reached" in said and "MODELSCOPE_ENDPOINT" in said


def talks(folder: Path, *names: str) -> Path:
    """A file of one row for each name; the row says the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"instruction": "Who?", "output": path.stem}) + "\n")
    return folder


def rows(hub: ModelScopeStandIn, home: Path, **fields: Any) -> list[Any]:
    said = python(ROWS, hub, home, json.dumps(fields)).splitlines()
    return [json.loads(line) for line in said if line.startswith("[")]


def test_data_are_fetched_and_read_by_split(hub: ModelScopeStandIn, tmp_path: Path) -> None:
    hub.hold("datasets", "zoo/talks", talks(tmp_path / "zoo", "train.jsonl", "test.jsonl"))
    assert rows(hub, tmp_path) == [["row 1", "train", []]]
    assert rows(hub, tmp_path, dataset_split="test") == [["row 1", "test", []]]


def test_data_are_read_as_their_card_says(hub: ModelScopeStandIn, tmp_path: Path) -> None:
    folder = talks(tmp_path / "zoo", "small.jsonl", "large.jsonl")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: small\n  data_files: small.jsonl\n"
                                      "- config_name: large\n  data_files: large.jsonl\n---\n")
    hub.hold("datasets", "zoo/talks", folder)
    assert rows(hub, tmp_path, dataset_config="large", dataset_revision="v1") == [["row 1", "large", []]]


def test_data_that_are_not_there_are_told(hub: ModelScopeStandIn, tmp_path: Path) -> None:
    assert "KitError: dataset: zoo/talks: " in python(ROWS, hub, tmp_path, "{}")


def test_a_push_arrives_whole_and_private(hub: ModelScopeStandIn, tmp_path: Path, starter: Path) -> None:
    run = small_run(tmp_path, starter, hub="modelscope")
    name = f"{USER}/cats-lora"
    said = python(PUSH, hub, tmp_path, str(run.folder), "private", MODELSCOPE_API_TOKEN=TOKEN)
    assert f"['{hub.url}/models/{name}']" in said
    assert [(made["Visibility"], made["License"]) for made in hub.made] == [(PRIVATE, "other")]
    arrived = hub.files["models", name]
    assert set(arrived) == {path.name for path in run.adapter.iterdir()} | {"README.md"}
    weights = "adapter_model.safetensors"
    assert arrived[weights] == (run.adapter / weights).read_bytes()
    assert b"from modelscope import" in arrived["README.md"] and b"parity adapter" in arrived["README.md"]
    assert not [path for path, data in arrived.items() if str(tmp_path).encode() in data]

    commits = len(hub.commits)
    said = python(PUSH, hub, tmp_path, str(run.folder), "private", MODELSCOPE_API_TOKEN=TOKEN)
    assert "already there, nothing sent" in said and len(hub.commits) == commits


def test_a_push_asks_for_a_login_and_keeps_the_secret(hub: ModelScopeStandIn, tmp_path: Path, starter: Path) -> None:
    run = small_run(tmp_path, starter, hub="modelscope")
    said = python(PUSH, hub, tmp_path, str(run.folder), "private")
    assert "no login at ModelScope" in said and "MODELSCOPE_API_TOKEN" in said and "`modelscope login`" in said
    said = python(PUSH, hub, tmp_path, str(run.folder), "private", MODELSCOPE_API_TOKEN="ms-ended-987654")
    assert "does not take this login (401)" in said and "ms-ended" not in said
    hub.files["models", f"{USER}/cats-lora"], hub.visibility[f"{USER}/cats-lora"] = {}, PUBLIC
    said = python(PUSH, hub, tmp_path, str(run.folder), "private", MODELSCOPE_API_TOKEN=TOKEN)
    assert "is public" in said and "--public" in said and hub.commits == []

"""`kit doctor`: each check passing and failing, its exit codes, and that it writes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.common.files import cache_dir
from kit.gguf.setup import converter_dir
from kit.models.starter import NAME
from kit.readiness import machine_checks as checks
from kit.readiness.doctor import line, run
from kit.readiness.forecast import ANSWERS, STEP, Forecast, forecast_on
from kit.readiness.model_checks import architecture, data, gguf_name, lacks, model, template, transformers_types
from kit.readiness.probe import ask
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gate
from support.command import PROJECT

QUICKSTART = Recipe.load("recipes/quickstart.yaml")
CPU = Machine("cpu", "a CPU", 2, 16.0, 100.0, True, "this CPU computes in bfloat16 itself")
GPU = Machine("cuda", "a GPU", 8, 16.0, 100.0, False, "compute capability 7.5 has no bfloat16")


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`kit doctor RECIPE FIELD=VALUE …` in a process of its own."""
    code = ("import sys; from kit.readiness.doctor import run; from kit.recipe.reading import parse_overrides; "
            "sys.exit(run(sys.argv[1] if sys.argv[1:] else None, parse_overrides(sys.argv[2:])))")
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=PROJECT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, **environment})


def child(code: str) -> Any:
    """What a process of its own prints as JSON on its last line."""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# ── packages


def test_packages_as_tested() -> None:
    gate = checks.packages()
    assert gate.passed is not False
    own = "\n".join(f"{name}=={checks._installed(name)}" for name in ("pydantic", "PyYAML"))
    assert checks.packages(None, _constraints(own)).passed is True


def test_other_versions_are_a_remark_that_names_both() -> None:
    gate = checks.packages(None, _constraints("pydantic==1.2.3\nPyYAML==0.1"))
    assert gate.passed is None and f"pydantic {checks._installed('pydantic')} (tested 1.2.3)" in gate.detail
    assert "PyYAML" in gate.detail and line(gate).startswith("! packages")
    assert "Python 2.7" not in gate.detail
    old = checks.packages(None, _constraints("", "(Python 2.7, Linux)"))
    assert old.passed is None and "tested 2.7" in old.detail


def test_a_missing_package_fails_with_the_line_that_installs_it() -> None:
    gate = checks.packages(None, _constraints("no-such-package==1.0\nllm-no==2\npydantic==1"))
    assert gate.passed is False and "no-such-package" in gate.figure and "pydantic" not in gate.figure
    assert "pip install no-such-package==1.0 llm-no==2" in gate.hint
    assert checks._install(["unsloth", "peft", "llama-cpp-python"], {"unsloth": "1", "peft": "2"}).split(" && ")[1:] \
        == [f"{Path(sys.executable).name} -m pip install --no-deps unsloth==1", checks.SETUP]


def test_a_missing_test_tool_is_a_remark() -> None:
    gate = checks.packages(None, _constraints("# checks\nno-such-tool==1.0"))
    assert gate.passed is None and "no-such-tool" in gate.detail


def test_what_only_several_processes_need_is_missed_only_by_a_recipe_that_asks_for_it() -> None:
    """After `make demo` alone there is no DeepSpeed, and nothing stands in the way of a run without it."""
    own = f"pydantic=={checks._installed('pydantic')}"
    for recipe, passed in ((None, True), (Recipe.load({}), True), (Recipe.load({}, fsdp=True), False)):
        gate = checks.packages(recipe, _constraints(f"\n# {checks.ENGINES}\nno-such-engine==1.0\n\n# GGUF\n{own}"))
        assert gate.passed is passed and (passed or gate.hint == "make engines"), gate


_folder: list[Path] = []


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path) -> None:
    _folder[:] = [tmp_path]


def _constraints(text: str, header: str = "(Python 3, Linux)") -> Path:
    file = _folder[0] / "constraints.txt"
    file.write_text(f"# tested together {header}\n\n{text}\n")
    return file


# ── device, memory, disk


@pytest.mark.parametrize(("machine", "fields", "said", "passed"), [
    (CPU, {}, "bfloat16: this CPU computes", True),
    (replace(CPU, bf16=False, bf16_reason="this CPU does not compute in bfloat16 itself"), {}, "float32: this CPU does",
     True),
    (GPU, {}, "float16: compute capability 7.5 has no bfloat16", True),
    (GPU, {"bf16": True}, "float16 instead of bfloat16: compute capability 7.5", None),
    (GPU, {"dtype": "bfloat16"}, "float16 instead of bfloat16: compute capability 7.5", None),
    (CPU, {"fp16": True}, "bfloat16 instead of float16", None),
    (CPU, {"dtype": "float32"}, "float32, as the recipe says", True),
    (CPU, {"dtype": "float32", "bf16": True}, "float32 weights, as the recipe says, and products in bfloat16", True),
    (GPU, {"dtype": "float32", "fp16": True}, "float32 weights, as the recipe says, and products in float16", True),
    (GPU, {"load_in_4bit": True}, "float16: compute capability", True),
])
def test_device_names_the_number_format_and_why(machine: Machine, fields: dict[str, Any], said: str,
                                                passed: bool | None) -> None:
    gate = checks.device(machine, Recipe.load({}, **fields))
    assert said in line(gate) and gate.passed is passed and machine.device_name in gate.figure


@pytest.mark.slow
def test_doctor_and_a_run_see_the_same_machine() -> None:
    seen = child("import json; from kit.recipe.machine import machine; print(json.dumps(vars(machine())))")
    said = ask("machine", ".")
    del seen["free_disk_gb"], said["machine"]["free_disk_gb"]  # others write meanwhile
    assert said["machine"] == seen
    assert 0 < said["free_memory_gb"] < seen["memory_gb"]


@pytest.mark.slow
def test_doctor_follows_unsloths_switch_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_CPU_BF16", "0")
    test_doctor_and_a_run_see_the_same_machine()


def test_memory_against_the_forecast(starter: Path) -> None:
    needs = forecast_on(CPU, QUICKSTART)
    assert needs.peak_memory_gb is not None and needs.peak_memory_gb < 16
    assert checks.memory(CPU, 15.0, needs).passed is True
    little = checks.memory(CPU, needs.peak_memory_gb / 2, needs)
    assert little.passed is None and "other programs" in little.detail
    certain = sum(size for name, size in needs.memory_gb.items() if name not in (STEP, ANSWERS))
    bound = checks.memory(replace(CPU, memory_gb=(certain + needs.peak_memory_gb) / 2), 15.0, needs)
    assert bound.passed is None and "max_seq_length" in bound.hint
    none = checks.memory(replace(CPU, memory_gb=certain / 2), 15.0, needs)
    assert none.passed is False and "before any row" in none.detail and "load_in_4bit" in none.hint
    gone = checks.memory(CPU, 15.0, forecast_on(CPU, QUICKSTART.model_copy(update={"model_name": "no/where"})))
    assert gone.passed is None and "not on this disk" in gone.figure and line(gone).startswith("–")


def test_an_export_without_room_in_the_machines_memory_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the run trains on; Colab's machine has 12.7 GB."""
    monkeypatch.setattr(checks, "memory_limit_gb", lambda: 12.7)
    for machine in (GPU, CPU):
        needs = Forecast(3.0, export_gb=5.0, memory_gb={"weights": 2.0})
        assert checks.memory(machine, 12.0, needs).passed is True
        large = checks.memory(machine, 12.0, replace(needs, export_gb=11.0))
        assert large.passed is None and "11.0 GB of the machine's 12.7 GB" in large.detail and "gguf: []" in large.hint


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.memory_limit_gb(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.memory_limit_gb(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("4000000000\n")
    assert checks.memory_limit_gb(tmp_path) == 4
    monkeypatch.setattr(checks, "memory_limit_gb", lambda: 4.0)
    assert "4.0 GB of 4.0 GB memory free" in checks.memory(CPU, 15.0, Forecast(1.0)).figure
    assert "15.0 GB of 16.0 GB GPU memory free" in checks.memory(GPU, 15.0, Forecast(1.0)).figure


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load({"output_dir": str(tmp_path / "runs")})
    assert checks.disk(recipe, Forecast(room_gb=0.001)).passed is True
    full = checks.disk(recipe, Forecast(room_gb=1e6))
    assert full.passed is False and "1000000.00 GB needed" in full.figure and "output_dir" in full.hint
    # On one disk the needs add up: with nothing set up, KIT_CACHE takes its own room.
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    free = shutil.disk_usage(tmp_path).free / 1e9
    assert checks.disk(recipe, Forecast(room_gb=free - checks.SETUP_GB / 2)).passed is False
    assert not (tmp_path / "cache").exists() and not (tmp_path / "runs").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    barred = checks.disk(recipe, Forecast(room_gb=0.001))
    assert barred.passed is False and "output_dir can't be written to" in barred.detail


def test_a_finished_run_of_that_name_is_a_remark(tmp_path: Path) -> None:
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "result.json").write_text('{"status": "finished"}')
    gate = checks.disk(QUICKSTART.model_copy(update={"output_dir": str(tmp_path)}), Forecast(room_gb=0.001))
    assert gate.passed is None and "finished run" in gate.detail and "--overwrite" in gate.hint


# ── model


def test_the_starter(starter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gate, folder = model(QUICKSTART)
    assert gate.passed is True and folder == starter
    monkeypatch.setenv("KIT_CACHE", str(tmp_path))
    gate, folder = model(QUICKSTART)
    assert gate.passed is True and "will be unpacked" in gate.figure and folder is None
    (tmp_path / "starter" / NAME).mkdir(parents=True)
    gate, _ = model(QUICKSTART)
    assert gate.passed is False and "config.json" in gate.detail and "delete that folder" in gate.hint


def test_no_starter_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path))
    monkeypatch.setattr("kit.models.starter.PACKAGE", "no-such-package")
    gate, _ = model(QUICKSTART)
    assert gate.passed is False and "no-such-package" in gate.detail and "pip install" in gate.hint


@pytest.fixture
def folder(starter: Path, tmp_path: Path) -> Path:
    """A model folder in two shards, as large models are."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        shutil.copy(starter / name, made / name)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        (made / shard).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    return made


def test_a_whole_folder(folder: Path) -> None:
    gate, found = model(Recipe.load({"model_name": str(folder)}))
    assert gate.passed is True and found == folder


@pytest.mark.parametrize(("name", "content", "said"), [
    ("model-00002-of-00002.safetensors", None, "model-00002-of-00002.safetensors"),
    ("model-00002-of-00002.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a whole model-00002"),
    ("model-00002-of-00002.safetensors", b"", "a whole model-00002"),
    ("model.safetensors.index.json", b"{", "a readable model.safetensors.index.json"),
    ("model.safetensors.index.json", None, "model.safetensors"),
    ("tokenizer.json", None, "a tokenizer"),
    ("config.json", None, "config.json"),
])
def test_a_folder_that_lacks_something(folder: Path, name: str, content: bytes | None, said: str) -> None:
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    gate, _ = model(Recipe.load({"model_name": str(folder)}))
    assert gate.passed is False and said in gate.detail and gate.hint


def test_a_shard_cut_short(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert lacks(folder) == [f"a whole {shard.name}"]


def test_quantised_weights_can_not_be_merged_into(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    gate, _ = model(Recipe.load({"model_name": str(folder)}))
    assert gate.passed is False and "16-bit" in gate.detail and "save_merged" in gate.hint
    assert model(Recipe.load({"model_name": str(folder), "save_merged": "none"}))[0].passed is True


def test_no_such_folder() -> None:
    gate, found = model(Recipe.load({"model_name": "/no/such/folder"}))
    assert gate.passed is False and "does not exist" in gate.detail and "starter" in gate.hint and found is None


class Hub:
    """A hub on this machine: answers every request with `status` and counts them."""

    def __init__(self) -> None:
        self.status, self.headers, self.wait = 200, {}, 0.0
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                hub.requests.append((self.command, self.path, self.headers["authorization"]))
                time.sleep(hub.wait)
                self.send_response(hub.status)
                for name, value in hub.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_HEAD = do_POST = _answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def _endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT, which huggingface_hub reads on import."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                        url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of our own, an empty cache, and nobody logged in."""
    made = Hub()
    _endpoint(made.url, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE",
                 "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_the_hub_is_asked_once_and_nothing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    gate, found = model(Recipe.load({"model_name": "Qwen/Qwen3-4B"}))
    assert gate.passed is True and found is None
    assert hub.requests == [("HEAD", "/Qwen/Qwen3-4B/resolve/main/config.json", None)]
    assert not (tmp_path / "hub").exists()


def test_a_name_that_no_hub_can_have(hub: Hub) -> None:
    gate, found = model(Recipe.load({"model_name": "no model"}))
    assert gate.passed is False and "no model" in gate.detail and gate.hint and found is None and not hub.requests


def test_a_redirect_is_an_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status, hub.headers = 307, {"Location": "http://storage.invalid/elsewhere"}  # the file itself
    monkeypatch.setenv("HF_TOKEN", "hf_notatoken")
    assert model(Recipe.load({"model_name": "Qwen/Qwen3-4B", "revision": "v1"}))[0].passed is True
    assert hub.requests == [("HEAD", "/Qwen/Qwen3-4B/resolve/v1/config.json", "Bearer hf_notatoken")]


@pytest.mark.parametrize(("status", "code", "said", "hint"), [
    (401, "", "answers 401", "HF_TOKEN"), (403, "GatedRepo", "403 (GatedRepo)", "accept its terms"),
    (404, "RepoNotFound", "404 (RepoNotFound)", "correct the name"), (503, "", "answers 503", "try later"),
])
def test_the_hub_says_no(hub: Hub, status: int, code: str, said: str, hint: str) -> None:
    hub.status, hub.headers = status, {"X-Error-Code": code}
    gate, _ = model(Recipe.load({"model_name": "Qwen/Qwen3-4B"}))
    assert gate.passed is False and said in gate.detail and hint in gate.hint and len(hub.requests) == 1


@pytest.mark.slow
def test_a_silent_hub_costs_two_seconds(hub: Hub) -> None:
    hub.wait = 4
    start = time.monotonic()
    gate, _ = model(Recipe.load({"model_name": "Qwen/Qwen3-4B"}))
    assert time.monotonic() - start < 3
    assert gate.passed is False and "can't be reached" in gate.detail and "HF_ENDPOINT" in gate.hint


def _cached(folder: Path, cache: Path) -> Path:
    """The folder as a snapshot in the hub's cache: a reference to a commit, and the commit's folder."""
    repo = cache / "models--Qwen--Qwen3-4B"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    return Path(shutil.copytree(folder, repo / "snapshots" / "abc123"))


@pytest.mark.parametrize("switch", ["local_files_only", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_cache_must_be_complete(hub: Hub, folder: Path, tmp_path: Path, switch: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.load({"model_name": "Qwen/Qwen3-4B", "local_files_only": switch == "local_files_only"})
    if switch != "local_files_only":
        monkeypatch.setenv(switch, "1")
    gate, _ = model(recipe)
    assert gate.passed is False and "lacks config.json, tokenizer and weights" in gate.detail
    snapshot = _cached(folder, tmp_path / "hub")
    gate, found = model(recipe)
    assert gate.passed is True and found == snapshot
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    gate, _ = model(recipe)
    assert gate.passed is False and "lacks model-00002-of-00002.safetensors" in gate.detail
    assert "local_files_only: false" in gate.hint and not hub.requests


def test_a_complete_cache_outlives_its_hub(hub: Hub, folder: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _cached(folder, tmp_path / "hub")
    assert model(Recipe.load({"model_name": "Qwen/Qwen3-4B"}))[0].passed is True
    _endpoint("http://127.0.0.1:9", monkeypatch)
    gate, found = model(Recipe.load({"model_name": "Qwen/Qwen3-4B"}))
    assert gate.passed is None and "local_files_only" in gate.hint and found == snapshot


def test_modelscope(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = Recipe.load({"model_name": "Qwen/Qwen3-4B", "hub": "modelscope"})
    gate, _ = model(recipe)
    assert gate.passed is False and gate.hint == "pip install modelscope"
    (tmp_path / "modelscope.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:9")
    gate, _ = model(recipe)
    assert gate.passed is False and "https://127.0.0.1:9 can't be reached" in gate.detail and not hub.requests


# ── data


def test_data_on_this_disk(tmp_path: Path) -> None:
    assert "2 files" in data(QUICKSTART).figure
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    gate = data(Recipe.load({"dataset": str(rows)}))
    assert gate.passed is False and "no bytes" in gate.detail
    with pytest.raises(KitError, match=r"rwos\.jsonl.*did you mean 'rows\.jsonl'"):
        data(Recipe.load({"dataset": str(tmp_path / "rwos.jsonl")}))
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(KitError, match="there is no"):
        data(Recipe.load({"dataset": str(rows), "eval_dataset": str(tmp_path / "no.jsonl")}))
    assert data(Recipe.load({"dataset": str(rows)})).passed is True


def test_data_on_a_hub(hub: Hub, tmp_path: Path) -> None:
    recipe = Recipe.load({"dataset": ["starter", "yahma/alpaca-cleaned"]})
    assert data(recipe).passed is True
    assert hub.requests == [("HEAD", "/datasets/yahma/alpaca-cleaned/resolve/main/README.md", None)]
    hub.status, hub.headers = 404, {"X-Error-Code": "EntryNotFound"}  # a data set without a README
    assert data(recipe).passed is True
    hub.headers = {"X-Error-Code": "RepoNotFound"}
    gate = data(recipe)
    assert gate.passed is False and "RepoNotFound" in gate.detail and "correct the name" in gate.hint


def test_data_offline(hub: Hub, tmp_path: Path) -> None:
    recipe = Recipe.load({"dataset": "yahma/alpaca-cleaned", "local_files_only": True})
    gate = data(recipe)
    assert gate.passed is False and "no train split" in gate.detail and "local_files_only: false" in gate.hint
    arrow = tmp_path / "datasets" / "yahma___alpaca-cleaned" / "default" / "0.0.0" / "1f" / "alpaca-cleaned-test.arrow"
    arrow.parent.mkdir(parents=True)
    arrow.write_bytes(b"ARROW1")
    assert data(recipe).passed is False
    arrow.rename(arrow.with_name("alpaca-cleaned-train-00000-of-00002.arrow"))
    assert data(recipe).passed is True and not hub.requests
    modelscope = recipe.model_copy(update={"hub": "modelscope"})
    assert "ModelScope" in data(modelscope).detail and data(modelscope).passed is False


# ── llama.cpp and architectures


def test_runtime_and_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    gate = checks.llama_cpp(QUICKSTART)
    assert gate.passed is True and "same version" in gate.figure
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    gate = checks.llama_cpp(QUICKSTART)
    assert gate.passed is False and "LLAMA_CPP_DIR" in gate.detail and gate.hint
    (tmp_path / "convert_hf_to_gguf.py").touch()
    gate = checks.llama_cpp(QUICKSTART)
    assert gate.passed is None and "another version" in gate.detail
    monkeypatch.delenv("LLAMA_CPP_DIR")
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "empty"))
    gate = checks.llama_cpp(QUICKSTART)
    assert gate.passed is False and "no GGUF converter" in gate.detail and checks.SETUP in gate.hint
    assert checks.llama_cpp(None).passed is False
    assert checks.llama_cpp(QUICKSTART.model_copy(update={"gguf": []})).passed is None


@pytest.mark.parametrize(("code", "said"), [
    ("raise OSError('libllama.so: cannot open shared object file')", "exit code 1: OSError: libllama.so"),
    ("import os; os.abort()", "killed by SIGABRT"),
    ("__version__ = '0.0.1'\ndef llama_backend_init(): pass", "what loads is version 0.0.1"),
])
def test_a_runtime_that_does_not_load(code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    gate = checks.llama_cpp(QUICKSTART)
    assert gate.passed is False and said in gate.detail and "pip uninstall" in gate.hint


def test_a_child_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KitError, match="no answer within 1 s"):
        ask("llama", seconds=1)


def test_a_known_architecture(starter: Path, tmp_path: Path) -> None:
    gate = architecture(QUICKSTART, starter)
    assert gate.passed is True and "LlamaForCausalLM (llama in GGUF)" in gate.figure and not gate.detail
    assert architecture(QUICKSTART, None).passed is None
    assert architecture(QUICKSTART, tmp_path).passed is None


def _model_of(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_architecture_transformers_does_not_know(tmp_path: Path) -> None:
    folder = _model_of(tmp_path, architectures=["FooForCausalLM"], model_type="foo", auto_map={"AutoConfig": "foo.Foo"})
    gate = architecture(QUICKSTART, folder)
    assert gate.passed is False and "'foo'" in gate.detail and "trust_remote_code" in gate.hint
    own = QUICKSTART.model_copy(update={"trust_remote_code": True})
    assert "converter does not know" in architecture(own, folder).detail
    assert architecture(own.model_copy(update={"gguf": []}), folder).passed is True
    _model_of(tmp_path, architectures=["BertForMaskedLM"], model_type="bert-of-old")
    assert "trust_remote_code" not in architecture(QUICKSTART, folder).hint


def test_an_architecture_the_converter_does_not_know(tmp_path: Path) -> None:
    folder = _model_of(tmp_path, architectures=["LlamaForNothing"], model_type="llama")
    gate = architecture(QUICKSTART, folder)
    assert gate.passed is False and "GGUF converter" in gate.detail and "gguf: []" in gate.hint
    assert architecture(QUICKSTART.model_copy(update={"gguf": []}), folder).passed is True


def test_an_architecture_the_runtime_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter newer than the runtime."""
    constants = tmp_path / "gguf-py" / "gguf" / "constants.py"
    constants.parent.mkdir(parents=True)
    constants.write_text('MODEL_ARCH_NAMES = {\n    MODEL_ARCH.NEWER: "newer-than-this",\n}\n')
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        '@ModelBase.register("LlamaForCausalLM")\nclass Newer(TextModel):\n    model_arch = gguf.MODEL_ARCH.NEWER\n')
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    gate = architecture(QUICKSTART, _model_of(tmp_path, architectures=["LlamaForCausalLM"], model_type="llama"))
    assert gate.passed is False and "'newer-than-this'" in gate.detail and "LLAMA_CPP_DIR" in gate.hint
    constants.unlink()
    with pytest.raises(KitError, match="has no gguf-py"):
        gguf_name(tmp_path, "LlamaForCausalLM")


def test_a_config_without_an_architecture(tmp_path: Path) -> None:
    gate = architecture(QUICKSTART, _model_of(tmp_path, model_type="llama"))
    assert gate.passed is False and "no architecture" in gate.detail


def test_the_runtime_is_asked_itself() -> None:
    answer = ask("llama", "llama", "qwen3", "gemma3", "no-such-thing")
    assert answer["probed"] and answer["known"] == {"llama": True, "qwen3": True, "gemma3": True,
                                                    "no-such-thing": False}


def test_a_runtime_with_other_words_is_not_taken_to_know_everything(starter: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(
        "from types import SimpleNamespace\n__version__ = '9'\nllama_backend_init = lambda: None\n"
        "llama_log_callback = lambda function: function\nllama_log_set = lambda function, data: None\n"
        "llama_model_default_params = SimpleNamespace\nllama_model_load_from_file = lambda path, options: None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gate = architecture(QUICKSTART, starter)
    assert gate.passed is None and "does not say" in gate.detail


@pytest.mark.slow
def test_the_converters_registry_is_read_as_it_reads_itself() -> None:
    folder = converter_dir()
    registry = child(
        f"import json, sys; sys.path[:0] = [{str(folder)!r}, {str(folder / 'gguf-py')!r}]\n"
        "import gguf; from conversion import ModelBase, ModelType, load_all_models; load_all_models()\n"
        "print(json.dumps({name: gguf.MODEL_ARCH_NAMES[kind.model_arch] for name, kind in "
        "ModelBase._model_classes[ModelType.TEXT].items()}))")
    assert len(registry) > 200
    assert {name: gguf_name(folder, name) for name in registry} == registry


@pytest.mark.slow
def test_the_types_transformers_knows_are_those_it_says() -> None:
    known = child("import json; from transformers.models.auto import modeling_auto as m\n"
                  "print(json.dumps([*m.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "
                  "*m.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))")
    assert transformers_types() == set(known)


# ── quantised layers


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_quantised_layers_run_here(bits: str) -> None:
    gate = checks.quantised(int(bits), CPU)
    assert gate.passed is True and gate.name == f"{bits}-bit"


@pytest.mark.slow
def test_no_4bit_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_CPU_LOAD_IN_4BIT", "0")
    gate = checks.quantised(4, CPU)
    assert gate.passed is False and "no 4-bit kernels" in gate.detail and "load_in_4bit: false" in gate.hint


# ── the command


def test_a_line_has_its_sign_cause_and_remedy() -> None:
    assert line(Gate("disk", False, "3 GB", detail="full", hint="free some")) == "✗ disk: 3 GB: full → free some"
    assert line(Gate("disk", None, "3 GB", detail="full soon")) == "! disk: 3 GB: full soon"
    assert line(Gate("disk", None, "unknown")) == "– disk: unknown"
    assert line(Gate("disk", True, "3 GB", hint="free some")) == "✓ disk: 3 GB"


def test_bad_input() -> None:
    with pytest.raises(KitError, match="no recipe"):
        run("recipes/no-such.yaml", {})
    with pytest.raises(KitError, match="learning_rate"):
        run("recipes/quickstart.yaml", {"learning_rate": -1})
    with pytest.raises(KitError, match="first argument is the recipe"):
        run("learning_rate=1", {})
    with pytest.raises(KitError, match="looks like a secret"):
        run("recipes/quickstart.yaml", {"system_prompt": "sk-" + "a1B2c3D4" * 4})


def _listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_quickstart_is_ready_in_seconds_and_nothing_is_written(starter: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(starter, cache / "starter" / NAME)
    (cache / converter_dir().name).symlink_to(converter_dir())
    before, home, there = _listing(cache), tmp_path / "home", _listing(cache_dir() / "starter")
    start = time.monotonic()
    done = doctor("recipes/quickstart.yaml", f"output_dir={tmp_path / 'runs'}", KIT_CACHE=str(cache),
                  HF_HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = re.findall(r"^\[(\d)/8\] [✓!]", done.stdout, re.MULTILINE)
    assert numbers == list("12345678") and "✗" not in done.stdout
    assert _listing(cache) == before and _listing(cache_dir() / "starter") == there
    assert not (tmp_path / "runs").exists() and not home.exists()
    assert seconds < 10


@pytest.mark.slow
def test_failures_give_exit_code_1_and_each_its_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "cache"
    done = doctor("recipes/quickstart.yaml", f"output_dir={tmp_path / 'runs'}", "model_name=/no/such/model",
                  "dataset=no-such.jsonl", "load_in_4bit=true", KIT_CACHE=str(empty), LLAMA_CPP_DIR="",
                  UNSLOTH_CPU_LOAD_IN_4BIT="0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    failed = [text for text in done.stdout.splitlines() if "✗" in text]
    for name in ("model", "data", "llama.cpp", "4-bit"):
        assert any(f"✗ {name}: " in text and " → " in text for text in failed), (name, done.stdout)
    assert len(failed) == 4 and "4 of 9 checks failed" in done.stdout
    assert not empty.exists() and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_torch_the_other_checks_go_on(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    done = doctor("recipes/quickstart.yaml", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "✗ device: failed: exit code 1: ImportError: libcudart.so.12" in done.stdout
    assert "✓ model" in done.stdout and "✗ disk" not in done.stdout


@pytest.mark.slow
def test_without_a_recipe_only_the_machine_is_checked() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^\[\d/4\] ", done.stdout, re.MULTILINE)) == 4
    assert done.stdout.rstrip().endswith("kit doctor recipes/quickstart.yaml")


# ── a template of one's own


@pytest.mark.slow
def test_a_template_of_ones_own_is_tried_on_the_models_tokenizer(tmp_path: Path, starter: Path) -> None:
    file = tmp_path / "模板 1.jinja"
    recipe = Recipe.load({}, chat_template=str(file))
    file.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    with pytest.raises(KitError, match="does not write what opens an answer") as caught:  # a line of the doctor
        template(recipe, starter)
    assert "mend" in caught.value.hint
    assert template(recipe, None).passed  # that shows with the tokenizer only
    file.write_text("{% for m in messages %}\n{% if %}")
    with pytest.raises(KitError, match=r"模板 1.jinja: line 2: Expected an expression"):
        template(recipe, None)

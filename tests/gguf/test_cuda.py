"""llama.cpp on a GPU: when it is built for one, with which flags, what is kept apart, and that it is used."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import GateError, KitError
from kit.gguf import child, cuda, setup, worker
from kit.gguf.child import LlamaChild, allowed_seconds
from kit.readiness import machine_checks


def program(path: Path, text: str) -> None:
    source = path.with_name(f"{path.name}.py")  # a first line can name no Python in a path with a space
    source.write_text(text)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{source}" "$@"\n')
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a T4, 16 cores and no nvcc; `host / "pip.jsonl"` is what pip was asked for."""
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools / "nvidia-smi", "print('Tesla T4, 7.5\\nTesla T4, 7.5')")
    program(tools / "c++", "")
    with tarfile.open(tmp_path / "source.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo(f"llama_cpp_python-9.9/vendor/llama.cpp/{setup.CONVERTER}")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"c"))
    program(tools / "pip", f"""
import json, os, pathlib, shutil, sys
asked = sys.argv[1:]
with open({str(tmp_path / 'pip.jsonl')!r}, "a") as log:
    log.write(json.dumps([asked, os.environ.get("CMAKE_ARGS", "")]) + "\\n")
if asked[0] == "download":
    shutil.copy({str(tmp_path / 'source.tar.gz')!r}, pathlib.Path(asked[-1]) / "llama_cpp_python.tar.gz")
if asked[0] == "wheel":
    if os.environ.get("NO_CUBLAS") and "GGML_CUDA=ON" in os.environ["CMAKE_ARGS"]:
        sys.exit("CMake Error at ggml-cuda:\\n  CUDA::cublas\\n  was not found\\n" + "words of pip\\n" * 30)
    (pathlib.Path(asked[asked.index("-w") + 1]) / "llama_cpp_python-9.9-py3-none-any.whl").write_bytes(b"w")
""")
    monkeypatch.setattr(setup, "PIP", (str(tools / "pip"),))
    monkeypatch.setattr(setup, "installed_version", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no toolkit"))
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    for name in ("CMAKE_ARGS", "LLAMA_CPP_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def give_nvcc(host: Path, release: str = "12.5") -> Path:
    program(host / "tools" / "nvcc", f"print('Cuda compilation tools, release {release}, V1')")
    return host / "tools" / "nvcc"


def asked(host: Path, verb: str) -> list[tuple[list[str], str]]:
    lines = (host / "pip.jsonl").read_text().splitlines() if (host / "pip.jsonl").exists() else []
    return [(arguments, flags) for arguments, flags in map(json.loads, lines) if arguments[0] == verb]


def wheels(host: Path) -> set[str]:
    return {path.parent.name for path in (host / "cache" / "wheels").rglob("*.whl")}


def test_where_nvcc_is_it_is_built_for_the_card_at_hand(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvcc = give_nvcc(host)
    assert setup.main() == 0
    [(_, flags)] = asked(host, "wheel")
    assert f"-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER={nvcc} -DCMAKE_CUDA_ARCHITECTURES=75" in flags
    assert re.search(r"for the GPU, about \d minutes on 16 cores", capsys.readouterr().out)
    assert asked(host, "install")[0][0].count("--force-reinstall") == 1


def test_without_nvcc_it_is_built_for_the_cpu_and_that_is_said(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main() == 0
    said = capsys.readouterr().out
    assert "GGML_CUDA" not in asked(host, "wheel")[0][1]
    assert "no nvcc" in said and "4 to 5 tokens/s" in said


def test_a_toolkit_beside_the_path_is_found(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = host / "cuda" / "bin"
    there.mkdir(parents=True)
    give_nvcc(host).rename(there / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(host / "cuda"))
    assert f"-DCMAKE_CUDA_COMPILER={there / 'nvcc'}" in cuda.plan().flags


@pytest.mark.parametrize("own", ["", "-DGGML_CUDA=on", "-DGGML_CUDA:BOOL=ON", "-DGGML_CUDA=off"])
def test_on_two_cores_only_who_asks_for_it_waits_for_it(host: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    give_nvcc(host)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setenv("CMAKE_ARGS", own)
    plan = cuda.plan()
    assert bool(plan.flags) == plan.asked == own.lower().endswith("=on")
    if not own:
        assert cuda.FOR_THE_GPU in plan.remark and "minutes on 2 cores" in plan.remark
    setup.main()
    assert asked(host, "wheel")[0][1].endswith(own), "the user's own flags come last"


def test_each_build_has_its_own_wheel(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU, GPU, another card, another CUDA: none is taken for another, and each is built once."""
    kept = []
    for step in ("cpu", "gpu", "card", "release", "cpu"):
        if step == "gpu":
            give_nvcc(host)
        if step == "card":
            program(host / "tools" / "nvidia-smi", "print('NVIDIA A100, 8.0')")
        if step == "release":
            give_nvcc(host, "13.0")
        if step == "cpu" and kept:
            monkeypatch.setenv("CMAKE_ARGS", "")
            (host / "tools" / "nvcc").unlink()
        setup.main()
        kept.append(len(wheels(host)))
    assert kept == [1, 2, 3, 4, 4]


def test_an_installed_runtime_for_the_cpu_is_replaced_where_a_gpu_can_be_had(host: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "installed_version", setup.pinned_version)
    setup.main()  # without nvcc it stays
    assert not asked(host, "wheel")
    give_nvcc(host)
    monkeypatch.setattr(setup, "offloads", lambda: True)
    setup.main()  # a build of the user's own that computes on the GPU stays too
    assert not asked(host, "wheel")
    monkeypatch.setattr(setup, "offloads", cuda.offloads)
    setup.main()
    assert len(asked(host, "wheel")) == len(asked(host, "install")) == 1


def test_a_build_for_the_gpu_that_fails_leaves_one_for_the_cpu(host: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """An nvcc without cuBLAS, as pip's packages of the compiler bring it."""
    give_nvcc(host)
    monkeypatch.setenv("NO_CUBLAS", "1")
    assert setup.main() == 0
    assert [("GGML_CUDA=ON" in flags) for _, flags in asked(host, "wheel")] == [True, False]
    assert "CUDA::cublas\n" in capsys.readouterr().out and len(asked(host, "download")) == 1
    assert setup.main() == 0 and len(asked(host, "wheel")) == 2, "it is not tried again and again"
    assert "failed before" in capsys.readouterr().out
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    assert setup.main() != 0, "who asked for it is told"


def test_doctor_says_that_the_gpu_stands_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "has_gpu", lambda: True)
    gate = machine_checks.llama_cpp(None)
    assert gate.passed and "built for the CPU" in gate.figure and cuda.FOR_THE_GPU in gate.figure
    monkeypatch.setattr(machine_checks, "has_gpu", lambda: False)
    assert "built for the CPU" not in machine_checks.llama_cpp(None).figure


# --- the layers on the GPU ---


class Loaded:
    """What llama_cpp.Llama is given; it does not load where `full` says that the GPU is."""

    metadata: dict[str, str] = {}  # noqa: RUF012
    full = False

    def __init__(self, **options: Any) -> None:
        self.options = options
        if self.full and options["n_gpu_layers"]:
            raise ValueError("Failed to create llama_context")


@pytest.mark.parametrize("offload, full, layers", [(True, False, -1), (False, False, 0), (True, True, 0)])
def test_all_layers_go_to_the_gpu_where_there_is_one_with_room(monkeypatch: pytest.MonkeyPatch, offload: bool,
                                                               full: bool, layers: int) -> None:
    monkeypatch.setattr(worker.llama_cpp, "llama_supports_gpu_offload", lambda: offload)
    monkeypatch.setattr(worker.llama_cpp, "Llama", Loaded)
    monkeypatch.setattr(Loaded, "full", full)
    made = worker.Worker()
    remark = made.load("m.gguf", 512, False, {}, [])
    assert made.llama.options["n_gpu_layers"] == layers
    assert ("it answers on the CPU" in remark and "llama_context" in remark) == full


def test_without_a_gpu_a_file_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.llama_cpp, "llama_supports_gpu_offload", lambda: False)

    def refuse(**_: Any) -> None:
        raise ValueError("Failed to load model from file")

    monkeypatch.setattr(worker.llama_cpp, "Llama", refuse)
    with pytest.raises(ValueError, match="Failed to load"):
        worker.Worker().load("m.gguf", 512, False, {}, [])


# --- time limits ---


@pytest.mark.parametrize("weights, tokens, file_gb, least, most", [
    (0.13e9, 0, 0.0, 30, 120),  # a hung child of the starter is noticed soon, whatever it was asked
    (0.13e9, 2048, 0.0, 30, 150),
    (4e9, 2048, 0.0, 4 * 2048 / 16, 3600),  # 16 tokens/s are read where 4 are written
    (7.6e9, 4096, 0.0, 4 * 4096 / 8, 3 * 3600),
    (7.6e9, 8, 0.0, 60, 120),  # between two pieces of text
    (7.6e9, 0, 15.2, 15.2e9 / 1e8, 1200)])  # a hundred megabytes a second
def test_the_silence_allowed_grows_with_tokens_and_weights(weights: float, tokens: int, file_gb: float, least: float,
                                                           most: float) -> None:
    assert least <= allowed_seconds(weights, tokens, int(file_gb * 1e9)) <= most


SLOW_WORKER = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    def say(**reply): print(json.dumps({"id": request["id"], **reply}), flush=True)
    if request["method"] == "load": say(result="")
    elif request["method"] == "stream":
        say(tokens=100); time.sleep(1.0); say(text="a"); time.sleep(float(sys.argv[1])); say(finish_reason="stop")
    else: time.sleep(1.0); say(result=None)
"""


def test_a_long_prompt_of_a_large_model_has_its_time_and_silence_between_tokens_has_not(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(SLOW_WORKER)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    monkeypatch.setattr(child, "PIECE_TOKENS", 0)
    for pause, ends in ((0.0, True), (1.0, False)):
        monkeypatch.setattr(child, "WORKER", (sys.executable, str(tmp_path / "worker.py"), str(pause)))
        with LlamaChild(tmp_path / "m.gguf", seconds=0.5) as model:
            model._weights = int(child.WEIGHTS_PER_SECOND / 25)  # a hundred tokens take four seconds
            talk = model.stream([], 8)
            assert next(talk) == "a"
            if ends:
                assert list(talk) == []
            else:
                with pytest.raises(GateError, match="no answer within 0 seconds"):
                    next(talk)
                continue
            model._weights = 0
            with pytest.raises(KitError, match="no answer within"):
                model.render([])


@pytest.mark.parametrize("logits, own, expected", [(True, None, "f32"), (False, None, None), (True, "f16", "f16")])
def test_compared_logits_are_summed_in_float32_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits: bool,
                                                        own: str | None, expected: str | None) -> None:
    """f16 matrices would be multiplied with sums in f16, an error that is not the file's; one's own setting wins."""
    monkeypatch.delenv("GGML_CUDA_CUBLAS_COMPUTE_TYPE", raising=False)
    if own:
        monkeypatch.setenv("GGML_CUDA_CUBLAS_COMPUTE_TYPE", own)
    (tmp_path / "worker.py").write_text(
        "import json, os, sys\nfor line in sys.stdin:\n    print(json.dumps({'id': json.loads(line)['id'], 'result': "
        "os.environ.get('GGML_CUDA_CUBLAS_COMPUTE_TYPE') if 'metadata' in line else ''}), flush=True)\n")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    monkeypatch.setattr(child, "WORKER", (sys.executable, str(tmp_path / "worker.py")))
    with LlamaChild(tmp_path / "m.gguf", logits=logits) as model:
        assert model.metadata() == expected

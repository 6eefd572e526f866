"""The set-up: what is asked for is what the kit imports; the converter comes whole or not at all."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import os
import re
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kit.common.errors import KitError
from kit.gguf import setup as llama_cpp_setup

ROOT = Path(__file__).resolve().parents[2]
# google.colab is there on Colab; the others are the user's choice.
OPTIONAL = {"deepspeed", "google", "modelscope", "modelscope_hub"}
CONVERTER = llama_cpp_setup.CONVERTER


# --- the requirement files ---


def asked_for(file: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(each.name): each for each in found}


def installed_apart(branch: str) -> set[str]:
    """The packages that the Makefile installs without their dependencies: 'gpu' or 'cpu'."""
    gpu, cpu = re.findall(r"^APART := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {canonicalize_name(name) for name in (gpu if branch == "gpu" else cpu).split()}


def with_dependencies(names: set[str]) -> set[str]:
    """`names` and what they bring, by the metadata of the installed packages."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        needs = [each for each in needs if not each.marker or each.marker.evaluate({"extra": ""})]
        waiting += [canonicalize_name(each.name) for each in needs]
    return seen


def kit_imports() -> dict[str, str]:
    """Distribution name → one kit file that imports it, standard library left out."""
    homes = importlib.metadata.packages_distributions()
    found: dict[str, str] = {}
    for file in sorted((ROOT / "kit").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in (name.split(".")[0] for name in modules):
                if module not in sys.stdlib_module_names | OPTIONAL | {"kit", "__future__"}:
                    for home in homes.get(module, [module]):
                        found[canonicalize_name(home)] = file.name
    return found


@pytest.mark.parametrize(("file", "branch"), [("requirements-cpu.txt", "cpu"), ("requirements.txt", "gpu")])
def test_every_package_the_kit_imports_is_installed_by(file: str, branch: str) -> None:
    # llama-cpp-python comes from kit.gguf.setup
    there = with_dependencies(set(asked_for(file))) | installed_apart(branch) | {"llama-cpp-python"}
    missing = {name: home for name, home in kit_imports().items() if name not in there}
    assert "pydantic" in kit_imports(), "the scan found nothing"
    assert not missing, f"{file} does not bring {missing}"


def test_cpu_packages_have_a_tested_version() -> None:
    tested = asked_for("constraints.txt")
    assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) for each in tested.values())
    assert not (set(asked_for("requirements-cpu.txt")) | installed_apart("cpu")) - set(tested)


def test_gpu_session_leaves_to_unsloth_what_unsloth_decides() -> None:
    unsloth = {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets"}
    assert not unsloth & set(asked_for("requirements.txt"))


def test_this_environment_is_the_tested_one() -> None:
    for name in ("transformers", "trl", "peft", "llama-cpp-python"):
        tested = asked_for("constraints.txt")[name]
        assert importlib.metadata.version(name) in tested.specifier, name


# --- the Makefile ---


def test_make_alone_lists_its_verbs() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    verbs = re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE)
    assert verbs == ["help", "setup", "lab", "engines", "demo", "test", "test-all", "test-fast", "test-gpu", "check",
                     "pair", "wheelhouse", "gpu-constraints", "docs", "data", "clean"]


# --- the converter ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    return tmp_path / "cache"


def source_archive(file: Path, members: dict[str, str]) -> Path:
    """A tar.gz with llama-cpp-python's folder layout."""
    with tarfile.open(file, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(f"llama_cpp_python-9.9/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return file


# Random hex does not compress, so a torn archive is torn inside a file.
WHOLE = {
    "setup.cfg": "",
    f"vendor/llama.cpp/{CONVERTER}": os.urandom(20_000).hex(),
    "vendor/llama.cpp/conversion/base.py": "b",
    "vendor/llama.cpp/models/templates/a.jinja": "{{ 1 }}",
    "vendor/llama.cpp/LICENSE": "MIT",
    "vendor/llama.cpp/tools/server.cpp": "int main",
}


def test_converter_is_taken_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "llama.cpp-9.9"
    llama_cpp_setup.take_converter(source_archive(tmp_path / "a.tar.gz", WHOLE), folder)
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert found == {CONVERTER, "conversion/base.py", "models/templates/a.jinja", "LICENSE", llama_cpp_setup.SIZES}
    assert llama_cpp_setup._damage(folder) == ""
    assert (folder / "conversion/base.py").read_text() == "b"


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_torn_archive_leaves_no_folder(tmp_path: Path, share: float) -> None:
    archive = source_archive(tmp_path / "a.tar.gz", WHOLE)
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    with pytest.raises(KitError, match=r"a\.tar\.gz could not be unpacked"):
        llama_cpp_setup.take_converter(archive, tmp_path / "llama.cpp-9.9")
    assert [each.name for each in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("name", [CONVERTER, "conversion/base.py"])
@pytest.mark.parametrize("harm", ["emptied", "gone"])
def test_a_damaged_converter_is_named_and_made_again(cache: Path, tmp_path: Path, name: str, harm: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    version = llama_cpp_setup.pinned_version()
    archive, folder = source_archive(tmp_path / "a.tar.gz", WHOLE), cache / f"llama.cpp-{version}"
    llama_cpp_setup.take_converter(archive, folder)
    (folder / name).write_text("") if harm == "emptied" else (folder / name).unlink()
    with pytest.raises(KitError, match=f"damaged: {name}"):
        llama_cpp_setup.converter_dir()
    monkeypatch.setattr(llama_cpp_setup, "_download", lambda version, into: archive)
    assert llama_cpp_setup.main() == 0
    assert llama_cpp_setup.converter_dir() == folder


def test_two_set_ups_at_once_wait_for_one_another(cache: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    archive = source_archive(tmp_path / "a.tar.gz", WHOLE)
    fetched: list[str] = []

    def download(version: str, into: Path) -> Path:
        fetched.append(version)
        time.sleep(0.5)
        return archive

    monkeypatch.setattr(llama_cpp_setup, "_download", download)
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda _: llama_cpp_setup.main(), range(4))) == [0] * 4
    assert len(fetched) == 1


def test_archive_that_points_outside_is_refused(tmp_path: Path) -> None:
    archive = source_archive(tmp_path / "a.tar.gz", WHOLE | {"vendor/llama.cpp/models/../../../../out": "x"})
    with pytest.raises(KitError, match="outside its folder"):
        llama_cpp_setup.take_converter(archive, tmp_path / "deep" / "er" / "llama.cpp-9.9")
    assert not list(tmp_path.rglob("out"))


def test_archive_without_converter_is_refused(tmp_path: Path) -> None:
    archive = source_archive(tmp_path / "a.tar.gz", {"vendor/llama.cpp/LICENSE": "MIT"})
    with pytest.raises(KitError, match=CONVERTER):
        llama_cpp_setup.take_converter(archive, tmp_path / "llama.cpp-9.9")


def test_converter_dir_names_the_command_when_there_is_none(cache: Path) -> None:
    with pytest.raises(KitError, match="no GGUF converter") as caught:
        llama_cpp_setup.converter_dir()
    assert "-m kit.gguf.setup" in caught.value.hint


def test_converter_dir_follows_the_installed_runtime(cache: Path, tmp_path: Path) -> None:
    version = llama_cpp_setup.installed_version()
    folder = cache / f"llama.cpp-{version}"
    folder.mkdir(parents=True)
    (folder / CONVERTER).write_text("x")
    (cache / "llama.cpp-9.9").mkdir()
    assert llama_cpp_setup.converter_dir() == folder


def test_users_llama_cpp_dir_wins(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "mine"
    own.mkdir()
    monkeypatch.setenv("LLAMA_CPP_DIR", str(own))
    with pytest.raises(KitError, match=r"LLAMA_CPP_DIR is .*mine"):
        llama_cpp_setup.converter_dir()
    (own / CONVERTER).touch()
    assert llama_cpp_setup.converter_dir() == own


# --- the build ---


def test_a_wheel_is_kept_apart_for_other_cmake_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    plain = llama_cpp_setup.machine_key()
    assert plain == llama_cpp_setup.machine_key()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    assert llama_cpp_setup.machine_key() != plain


def test_missing_compiler_is_said_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KitError, match=r"no C\+\+ compiler") as caught:
        llama_cpp_setup._compile(tmp_path / "a.tar.gz", tmp_path)
    assert "apt-get install" in caught.value.hint


def test_a_failed_build_shows_the_end_of_its_log(cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    broken = source_archive(tmp_path / "llama_cpp_python-9.9.tar.gz", {"README.md": "no build here"})
    with pytest.raises(KitError, match="did not compile") as caught:
        llama_cpp_setup._compile(broken, tmp_path)
    assert "llama-cpp-build.log" in str(caught.value)
    assert not list(tmp_path.glob("*.whl"))


def test_set_up_again_does_nothing_and_says_so(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = llama_cpp_setup.pinned_version()
    folder = cache / f"llama.cpp-{version}"
    folder.mkdir(parents=True)
    (folder / CONVERTER).write_text("x")
    assert llama_cpp_setup.main() == 0
    assert "are ready" in capsys.readouterr().out
    assert {each.name for each in cache.iterdir()} == {folder.name, "setup.lock"}

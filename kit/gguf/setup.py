"""llama.cpp from one source archive: the runtime (llama-cpp-python) and the converter that matches it.

    python -m kit.gguf.setup

llama-cpp-python's archive on the package index carries the llama.cpp sources it is built from, and with
them convert_hf_to_gguf.py. Both come from there, so a GGUF is written and read by the same version. The
wheel is compiled once per machine and kept, as the converter is, in the cache folder.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from filelock import FileLock, Timeout

from kit.common.errors import KitError
from kit.common.files import PROJECT, cache_dir, read_json, whole_folder, write_json
from kit.gguf.cuda import SLOW, Plan, offloads, plan, release

PACKAGE = "llama-cpp-python"
CONVERTER = "convert_hf_to_gguf.py"
SIZES = "kit-sizes.json"  # of the unpacked files
# Of vendor/llama.cpp: the converter with its modules; models/ has vocabularies and chat templates for tests.
KEPT = (CONVERTER, "conversion", "gguf-py", "models", "LICENSE")
# The Python package loads libllama alone: no multimodal library, no HTTPS, and none of `common`, which the
# package's CMakeLists switches on by a cache entry that only a plain variable (SLIM_CMAKE) can overrule.
CMAKE_DEFAULTS = "-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF"
SLIM_CMAKE = "set(LLAMA_BUILD_COMMON OFF)\n"
PIP = (sys.executable, "-m", "pip")
PIPED: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8",
                         "errors": "replace"}
FAILED = "failed.txt"  # beside where a wheel would lie: why it could not be made
SETUP = f"{Path(sys.executable).name} -m kit.gguf.setup"


def main() -> int:
    """Bring runtime and converter to the version in constraints.txt; returns the exit code."""
    try:
        _set_up(pinned_version())
    except KitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def converter_dir() -> Path:
    """The llama.cpp folder with convert_hf_to_gguf.py: `LLAMA_CPP_DIR`, else the installed runtime's own.

    Raises KitError when `LLAMA_CPP_DIR` holds no converter, or nothing has been set up yet.
    """
    if own := os.environ.get("LLAMA_CPP_DIR"):
        folder = Path(own).expanduser().resolve()
        if not (folder / CONVERTER).is_file():
            raise KitError(f"LLAMA_CPP_DIR is {own}, which holds no {CONVERTER}",
                           "set it to the top folder of a llama.cpp checkout, or unset it to use the matching one")
        return folder
    version = installed_version()
    if version is None:
        raise KitError(f"{PACKAGE} is not installed, so there is no GGUF converter", SETUP)
    folder = _converter_folder(version)
    if damage := _damage(folder):
        raise KitError(f"no GGUF converter for {PACKAGE} {version}: {damage}", SETUP)
    return folder


def _damage(folder: Path) -> str:
    """Why the unpacked converter can't be used, or ''."""
    if not folder.is_dir():
        return f"{folder} is missing"
    def size(name: str) -> int:
        return (folder / name).stat().st_size if (folder / name).is_file() else 0

    written = read_json(folder / SIZES) or {CONVERTER: size(CONVERTER)}  # earlier versions of the kit noted no sizes
    changed = [name for name in written if not size(CONVERTER) or size(name) != written[name]]
    return f"{folder} is damaged: {', '.join(changed[:3])}" if changed else ""


def installed_version() -> str | None:
    """The installed llama-cpp-python's version, without importing it."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned_version() -> str:
    """The llama-cpp-python version that constraints.txt names."""
    file = PROJECT / "constraints.txt"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    pin = re.search(rf"^{PACKAGE}==(\S+)", text, re.MULTILINE)
    if not pin:
        raise KitError(f"{file} names no {PACKAGE} version", f"add a line like {PACKAGE}==0.3.36")
    return pin[1]


def _converter_folder(version: str) -> Path:
    return cache_dir() / f"llama.cpp-{version}"


def _set_up(version: str) -> None:
    cache_dir().mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir() / "setup.lock")  # of two set-ups at once the second finds what the first made
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print("llama.cpp: waiting for another set-up that is at work", flush=True)
        lock.acquire()
    with lock:
        _make_ready(version)


def _make_ready(version: str) -> None:
    has_converter = os.environ.get("LLAMA_CPP_DIR") or not _damage(_converter_folder(version))
    wanted = plan()
    failed = _wheels(version, wanted.flags) / FAILED
    if wanted.flags and not wanted.asked and failed.is_file():
        wanted = Plan(remark=f"for the CPU: for the GPU it failed before, {failed} says how (delete it to try again)")
    needs_runtime = installed_version() != version or bool(wanted.flags and not offloads())
    if has_converter and not needs_runtime:
        print(f"llama.cpp: {PACKAGE} {version} and its converter are ready ({converter_dir()})")
        return
    with tempfile.TemporaryDirectory(dir=cache_dir(), suffix=".partial") as scratch:
        sources = cache(lambda: _download(version, Path(scratch)))
        if not has_converter:
            take_converter(sources(), _converter_folder(version))
        if not needs_runtime:
            return
        if wanted.remark:
            print(f"llama.cpp: {wanted.remark}", flush=True)
        try:
            _install(_wheel(version, wanted.flags, sources, Path(scratch)))
        except KitError as error:
            if not wanted.flags or wanted.asked:
                raise
            failed.parent.mkdir(parents=True, exist_ok=True)
            failed.write_text(str(error), encoding="utf-8")
            print(f"llama.cpp: the build for the GPU failed, and is made for the CPU. {SLOW}. {error}", flush=True)
            if installed_version() != version:
                _install(_wheel(version, "", sources, Path(scratch)))


def _wheels(version: str, flags: str) -> Path:
    return cache_dir() / "wheels" / f"{PACKAGE}-{version}-{machine_key(flags)}"


def _wheel(version: str, flags: str, sources: Callable[[], Path], scratch: Path) -> Path:
    """The wheel that is kept for this machine and these flags; compiled where there is none."""
    wheels = _wheels(version, flags)
    if kept := next(wheels.glob("*.whl"), None):
        return kept
    compiled = _compile(sources(), scratch, flags)
    wheels.mkdir(parents=True, exist_ok=True)
    # Moved to its place when whole, so that an interrupted build leaves nothing that counts.
    return compiled.replace(wheels / compiled.name)


def machine_key(flags: str = "") -> str:
    """What a wheel depends on beyond its version: the Python, the CPU it was compiled for, the CMake flags; built for a
    GPU, the `flags` for it, which name the card, and the CUDA release.

    A wheel compiled for another CPU would end the process with an illegal instruction.
    """
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():  # "flags" on x86, "Features" on Arm
        lines = (line for line in info.read_text().splitlines() if line.startswith(("flags", "Features")))
        cpu += next(lines, "")
    built = f"{cpu} {os.environ.get('CMAKE_ARGS', '')}" + (f" {flags} {release()}" if flags else "")
    digest = hashlib.sha256(built.encode()).hexdigest()[:8]
    return f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}-{digest}"


def _download(version: str, into: Path) -> Path:
    """The source archive (77 MB) from the package index that pip is set to."""
    print(f"llama.cpp: downloading the {PACKAGE} {version} sources", flush=True)
    done = _pip("download", "--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={version}", "-d", str(into))
    archive = next(into.glob("*.tar.gz"), None)
    if done.returncode or archive is None:
        raise KitError(f"pip could not download {PACKAGE} {version}:\n{_tail(done.stdout)}",
                       f"check the network and pip's index, then run {SETUP} again")
    return archive


def take_converter(archive: Path, folder: Path) -> None:
    """Unpack the converter's part of a llama-cpp-python source archive to `folder`, whole or not at all.

    Raises KitError when the archive is torn, holds no converter, or names a path outside the folder.
    """
    print(f"llama.cpp: unpacking the converter to {folder}", flush=True)
    sizes: dict[str, int] = {}
    with whole_folder(folder) as partial:
        try:
            with tarfile.open(archive) as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    parts = PurePosixPath(member.name).parts  # <package>-<version>/vendor/llama.cpp/...
                    if parts[1:3] != ("vendor", "llama.cpp") or not set(parts[3:4]) & set(KEPT):
                        continue
                    if ".." in parts:
                        raise tarfile.TarError(f"it names a path outside its folder: {member.name}")
                    target = partial.joinpath(*parts[3:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, target.open("wb") as copy:  # type: ignore[union-attr]
                        shutil.copyfileobj(source, copy)
                    sizes["/".join(parts[3:])] = target.stat().st_size
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise KitError(f"{archive.name} could not be unpacked: {error}", f"run {SETUP} again") from error
        if not (partial / CONVERTER).is_file():
            raise KitError(f"{archive.name} holds no vendor/llama.cpp/{CONVERTER}", SETUP)
        write_json(partial / SIZES, sizes)


def _compile(archive: Path, scratch: Path, cuda: str = "") -> Path:
    """Build the wheel with pip, one line of progress while it compiles; the log stays in the cache folder."""
    compilers = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    if sys.platform != "win32" and not any(map(shutil.which, compilers)):
        raise KitError(f"no C++ compiler found (looked for {', '.join(compilers)}); llama.cpp is C++",
                       "Debian or Ubuntu: sudo apt-get install g++ · Fedora: sudo dnf install gcc-c++ · "
                       "macOS: xcode-select --install")
    slim = scratch / "slim.cmake"
    slim.write_text(SLIM_CMAKE)
    # The user's own flags come last, so they win.
    flags = [CMAKE_DEFAULTS, f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={shlex.quote(slim.as_posix())}", cuda,
             os.environ.get("CMAKE_ARGS", "")]
    environment = {"CMAKE_BUILD_PARALLEL_LEVEL": str(min(os.cpu_count() or 1, 16)),  # each compiler takes up to 1 GB
                   **os.environ, "CMAKE_ARGS": " ".join(flags)}
    print(f"llama.cpp: compiling {PACKAGE} for this {'GPU' if cuda else 'CPU (2 to 4 minutes on two cores)'}, once",
          flush=True)
    # pip's own cache is left out: it knows nothing of the CPU a wheel was compiled for.
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-cache-dir", "-w", str(scratch), str(archive)]
    log = cache_dir() / "llama-cpp-build.log"
    with log.open("w", encoding="utf-8") as record, subprocess.Popen(command, env=environment, **PIPED) as build:
        try:
            _show_progress(build, record)
        except BaseException:
            build.terminate()
            raise
    wheel = next(scratch.glob("*.whl"), None)
    if build.returncode or wheel is None:
        text = log.read_text("utf-8")
        cause = re.search(r"^.*(CMake Error|fatal error|error:).*(\n.*){3}", text, re.MULTILINE)  # then pip speaks
        raise KitError(f"{PACKAGE} did not compile; from {log}:\n{_tail(cause[0] if cause else text)}",
                       f"mend what it names there, then run {SETUP} again")
    return wheel


def _show_progress(build: subprocess.Popen[str], record: TextIO) -> None:
    """Copy pip's output to the log; on a terminal one moving line, else a line every 20 seconds."""
    start = shown = time.monotonic()
    in_terminal = sys.stdout.isatty()
    for line in build.stdout or ():
        record.write(line)
        step = re.match(r"\s*\[\s*(\d+/\d+|\d+%)\]", line)  # ninja counts files, make gives per cent
        now = time.monotonic()
        if step and (in_terminal or now - shown > 20):
            shown = now
            print(f"llama.cpp:   [{step[1]}] {now - start:.0f} s ", end="\r" if in_terminal else "\n", flush=True)
    print(f"llama.cpp:   the build took {time.monotonic() - start:.0f} s ", flush=True)


def _install(wheel: Path) -> None:
    """Install the wheel and load it once in a child process."""
    print(f"llama.cpp: installing {wheel.name}", flush=True)
    # Of one version there is a build for the CPU and one for the GPU.
    done = _pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))
    if done.returncode:
        raise KitError(f"pip could not install {wheel}:\n{_tail(done.stdout)}",
                       f"delete that file, then run {SETUP} again")
    loaded = subprocess.run([sys.executable, "-c", "import llama_cpp; llama_cpp.llama_backend_init()"], **PIPED)
    if loaded.returncode:
        wheel.unlink()
        raise KitError(f"{wheel.name} does not load here (exit code {loaded.returncode}):\n{_tail(loaded.stdout)}",
                       f"{Path(sys.executable).name} -m pip uninstall -y {PACKAGE}, then {SETUP} compiles it again")


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PIP, *arguments], **PIPED)


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(f"  {line[:200]}" for line in text.strip().splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())

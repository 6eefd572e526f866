"""Write constraints-gpu.txt again: the GPU set with the versions of constraints.txt, resolved for each Python given.

    python tools/gpu_constraints.py python3.11 python3.12 python3.13

Nothing is installed. Where the Pythons need different versions a line has a marker.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
HEADER = """\
# The GPU set (requirements.txt): the versions that it resolves to on Linux with Python {pythons}.
#
# Written by tools/gpu_constraints.py (make gpu-constraints); change constraints.txt, not this file. What both sets have
# is of one version. triton is the one that torch's CUDA build brings. docs/hosts.md says what was installed and run.
"""
OWN = ("triton",)  # torch for CUDA names its own; constraints.txt has the one for machines without a GPU


def tested() -> dict[str, str]:
    """The lines of constraints.txt by their name."""
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if re.match(r"[\w.-]+==", line))
    return {name: version for name, version in pins.items() if name not in OWN}


def resolve(python: str, constraints: Path) -> tuple[str, dict[str, str]]:
    """A Python's version and the packages that pip would install for it; pip's own words when it can't."""
    # Folders of wheels would offer other builds than the index.
    environment = {**os.environ, "PIP_FIND_LINKS": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-",
               "-r", str(PROJECT / "requirements.txt"), "-c", str(constraints)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python}: pip could not resolve requirements.txt")
    report = json.loads(done.stdout)
    found = {plain(each["metadata"]["name"]): each["metadata"]["version"] for each in report["install"]}
    if "+cpu" in found["torch"]:
        sys.exit(f"{python}: torch {found['torch']} is not for a GPU; it comes from a folder of wheels that pip's "
                 "configuration names, PIP_CONFIG_FILE=/dev/null goes without")
    return report["environment"]["python_version"], found


def plain(name: str) -> str:
    """One spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lines(found: dict[str, dict[str, str]]) -> list[str]:
    """`name==version`, with a marker where it does not hold for every Python."""
    written = []
    for name in sorted(set().union(*found.values())):
        by_version: dict[str, list[str]] = {}
        for python, packages in found.items():
            if name in packages:
                by_version.setdefault(packages[name], []).append(python)
        for version, pythons in by_version.items():
            marker = " or ".join(f'python_version == "{python}"' for python in pythons)
            written.append(f"{name}=={version}" + (f" ; {marker}" if len(pythons) < len(found) else ""))
    return written


def main(pythons: list[str]) -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in tested().items()))
        found = dict(resolve(python, constraints) for python in pythons)
    rest = {plain(name): version for name, version in tested().items()}  # JupyterLab, DeepSpeed, the starter model
    for packages in found.values():
        packages.update({name: version for name, version in rest.items() if name not in packages})
    header = HEADER.format(pythons=", ".join(found))
    (PROJECT / "constraints-gpu.txt").write_text(header + "\n" + "\n".join(lines(found)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])

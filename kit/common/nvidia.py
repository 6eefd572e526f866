"""What NVIDIA's driver says through its tool: asked without torch, which may not be there yet, or may not see a GPU."""

import os
import re
import subprocess
from contextlib import suppress


def has_gpu() -> bool:
    """Whether the driver names a GPU, and CUDA_VISIBLE_DEVICES does not hide all of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and bool(_said("-L"))


def cards() -> list[tuple[str, str]]:
    """(name, compute capability such as 7.5) of each GPU; drivers that are too old to say it name none."""
    if not has_gpu():
        return []
    said = _said("--query-gpu=name,compute_cap", "--format=csv,noheader")
    return re.findall(r"^(.+), (\d+\.\d)\s*$", said, re.MULTILINE)


def driver() -> tuple[str, str, str]:
    """(name of the first GPU, version of the driver, newest CUDA that it serves), '?' for what it does not say."""
    found = [re.search(pattern, _said(*options)) for pattern, options in (
        (r"GPU 0: (.+?) \(", ["-L"]), (r"(\S+)", ["--query-gpu=driver_version", "--format=csv,noheader"]),
        (r"CUDA Version: *([\d.]+)", []))]
    card, version, cuda = (match[1] if match else "?" for match in found)
    return card, version, cuda


def _said(*arguments: str) -> str:
    """What the tool prints, '' where it is missing or finds no GPU."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
        return done.stdout if done.returncode == 0 else ""
    return ""

"""The host that this runs on, and what follows from it: folders on the disk with room, the way to the hubs, a token.

It needs the standard library alone, as before packages are installed. What the user has set stays as it is.
"""

import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
# Each by what it says of itself. Kaggle's images are built on Colab's and keep its variables: it is asked first.
SIGNS: dict[str, Callable[[], bool]] = {
    "kaggle": lambda: "KAGGLE_KERNEL_RUN_TYPE" in os.environ or "KAGGLE_URL_BASE" in os.environ,
    "colab": lambda: "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules,
    "autodl": lambda: (ROOT / "root/autodl-tmp").is_dir(),
    "modelscope": lambda: (ROOT / "mnt/workspace").is_dir() and any(
        name.startswith(("MODELSCOPE_", "DSW_", "PAI_")) for name in os.environ)}
DISKS = {"autodl": "root/autodl-tmp", "modelscope": "mnt/workspace"}  # the system's disk is small there, or is wiped
ATTACHED = {"kaggle": ("kaggle/input",), "modelscope": ("mnt/workspace",),
            "autodl": ("root/autodl-tmp", "root/autodl-fs", "root/autodl-pub", "autodl-pub")}
# A variable, its folder on the data disk, and where the same lies without it.
CACHES = (("HF_HOME", "huggingface", "~/.cache/huggingface"), ("MODELSCOPE_CACHE", "modelscope", "~/.cache/modelscope"),
          ("KIT_CACHE", "kit-cache", "~/.cache/unsloth-kit"))
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
DIRECT = ".modelscope.cn,.aliyuncs.com"  # in the same country: the accelerator is for what lies outside of it
DRIVE = "content/drive"
KEPT = ("wheels/*", "llama.cpp-*")  # of KIT_CACHE: what takes minutes to make
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx")
WHEELHOUSE = ".tar.gz.kept"  # what only make wheelhouse calls a file
DEPTH, MOST = 6, 3000  # folders of attached disks: how deep and how many are looked into
SHOWN = 8

accelerated: list[str] = []  # the variables that settle() took from AutoDL's accelerator
fields: dict[str, str] = {}  # recipe fields that follow from the set-up cell; Recipe.given() has them


class Found(NamedTuple):
    """What lies on attached disks: model folders, files of rows, folders of wheels (make wheelhouse)."""

    models: list[Path]
    rows: list[Path]
    wheels: list[Path]


def environment() -> str:
    """kaggle, colab, autodl, modelscope (all rented by the hour, and nobody's own) or local."""
    return next((host for host, is_here in SIGNS.items() if is_here()), "local")


def settle() -> list[str]:
    """Set what this host needs and nobody has set, for this process and those it starts; a line for each.

    `import kit` calls it, so that notebook, commands and torchrun look in the same places.
    """
    host = environment()
    said = []
    if disk := DISKS.get(host):
        for name, folder, home in CACHES:
            place = ROOT / disk / folder
            in_use = not place.is_dir() and any(Path(home).expanduser().glob("*"))  # and a token may lie there
            if not os.environ.get(name) and not in_use and not (name == "HF_HOME" and os.environ.get("HF_HUB_CACHE")):
                os.environ[name] = str(place)
                said.append(f"{name}: {place}, on the data disk")
    if host == "autodl":
        said += _accelerate()
    return said


def _accelerate() -> list[str]:
    """AutoDL's way to GitHub and Hugging Face. Its file is shell: plain values are read from it, nothing is run."""
    file = ROOT / "etc/network_turbo"
    chosen = {"HF_ENDPOINT", *PROXIES[:2], "all_proxy"}
    if os.environ.get("KIT_NETWORK") == "direct" or any(os.environ.get(name) or os.environ.get(name.upper())
                                                        for name in chosen) or not file.is_file():
        return []
    pattern = rf"^\s*(?:export\s+|.*&&\s*export\s+)?({'|'.join(PROXIES)})=[\"']?([^\s\"'`$&;|]+)[\"']?\s*$"
    text = file.read_text(encoding="utf-8", errors="replace").replace("&&", "\n")
    values = dict(re.findall(pattern, text, re.MULTILINE))
    if "https_proxy" not in values:
        return [f"{file}: holds no plain https_proxy; set it yourself, or HF_ENDPOINT for a mirror"]
    values["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), values.get("no_proxy"), DIRECT]))
    for name, value in values.items():
        if name == "no_proxy" or not os.environ.get(name):
            os.environ[name] = value
            accelerated.append(name)
    return [f"https_proxy: AutoDL's accelerator ({file}), not for pip and ModelScope; KIT_NETWORK=direct does without"]


settled = settle()


def arrive(drive: bool = False) -> Iterator[str]:
    """What a notebook's set-up cell has to say and to do on this host, before packages are installed."""
    host = environment()
    if host == "local":
        return
    yield f"host: {host}"
    yield from settled
    if host == "colab" and drive:
        yield _mount()
    if line := _token(host):
        yield line
    if host == "kaggle":
        yield "disk: /kaggle/working holds 20 GB and is kept with the version; caches lie outside of it and are not"
    if host == "modelscope":
        yield "hub: set hub = \"modelscope\" in step 2, or the variable HF_ENDPOINT to a mirror of Hugging Face"
    found = look(host)
    for name, paths in (("model_name", found.models), ("dataset", found.rows)):
        if paths:
            more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
            yield f"on the disk, for {name}: " + ", ".join(map(str, paths[:SHOWN])) + more


def leave() -> None:
    """After the packages are there: what was built is kept on the Drive, when that is mounted for it."""
    if fields.get("checkpoint_dir"):
        _copy(_cache(), _on_drive() / "kit-cache")


def look(host: str) -> Found:
    """What lies on the disks that this host has attached; a bounded look, they can be large and slow."""
    found, budget = Found([], [], []), MOST
    waiting = [(ROOT / place, 0) for place in ATTACHED.get(host, ())]
    own = {Path(os.environ[name]) for name, _, _ in CACHES if os.environ.get(name)}
    while waiting and budget:
        folder, depth = waiting.pop(0)
        budget -= 1
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        names = [entry.name for entry in entries]
        is_model = "config.json" in names and any(name.endswith(".safetensors") for name in names)
        if is_model or any(name.endswith(WHEELHOUSE) for name in names):
            (found.models if is_model else found.wheels).append(folder)
        elif "kit" not in names and not _is_code(names):
            if host == "kaggle" and "config.json" not in names:  # elsewhere the disk is the user's own
                found.rows.extend(folder / name for name in names if name.lower().endswith(ROWS))
            waiting += [(folder / entry.name, depth + 1) for entry in entries
                        if depth < DEPTH and entry.is_dir() and entry.name[0] != "." and folder / entry.name not in own]
    return found


def _is_code(names: Iterable[str]) -> bool:
    """An environment or a clone: nothing to find, and thousands of folders."""
    return not {"pyvenv.cfg", "site-packages", "node_modules", ".git"}.isdisjoint(names)


def _token(host: str) -> str:
    """HF_TOKEN from the host's secrets into the environment, where the user gave it to this notebook."""
    if os.environ.get("HF_TOKEN"):
        return ""
    with suppress(Exception):  # no such secret, not given to this notebook, no person to ask: each an error of its own
        if host == "colab":
            value = importlib.import_module("google.colab.userdata").get("HF_TOKEN")
        elif host == "kaggle":
            value = importlib.import_module("kaggle_secrets").UserSecretsClient().get_secret("HF_TOKEN")
        else:
            return ""
        if value:
            os.environ["HF_TOKEN"] = value
            return "HF_TOKEN: from this notebook's secrets"
    return ""


def _mount() -> str:
    """Google Drive, for checkpoints and for what was built; its window asks the user."""
    importlib.import_module("google.colab.drive").mount(str(ROOT / DRIVE))
    fields["checkpoint_dir"] = str(_on_drive() / "checkpoints")
    _copy(_on_drive() / "kit-cache", _cache())
    return f"Drive: {_on_drive()} keeps checkpoints (checkpoint_dir) and the compiled llama.cpp"


def _on_drive() -> Path:
    return ROOT / DRIVE / "MyDrive" / "unsloth-kit"


def _cache() -> Path:
    return Path(os.environ.get("KIT_CACHE") or "~/.cache/unsloth-kit").expanduser()


def _copy(source: Path, target: Path) -> None:
    """What is worth keeping of a cache, where it isn't there yet. As a cache the Drive would be slow, without locks."""
    for path in (path for pattern in KEPT for path in source.glob(pattern)):
        copy = target / path.relative_to(source)
        if not copy.exists() and path.is_dir() and path.suffix not in (".partial", ".old"):
            partial = copy.with_name(copy.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(path, partial)
            partial.replace(copy)

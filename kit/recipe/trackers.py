"""`report_to`: the trackers that transformers knows; whether one is installed and logged in, before a run begins."""

import importlib.util
import netrc
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from kit.common.errors import KitError, nearest

# Each with the modules it needs, of which "a|b" is either, and what pip installs
# (transformers.integrations.integration_utils).
TRACKERS = {
    "azure_ml": ("azureml.core", "azureml-core"), "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"), "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub mlflow", "dagshub mlflow"), "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit flytekitplugins-deck-standard"), "kubeflow": ("", ""),
    "mlflow": ("mlflow", "mlflow"), "neptune": ("neptune", "neptune"), "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard|tensorboardX", "tensorboard"), "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb")}


def named(value: object) -> str | list[str]:
    """What report_to says, a name or several as a list or with commas between them, as transformers takes it.

    Raises ValueError for a name that transformers does not know.
    """
    if value is None or value is False:
        value = "none"
    names = value if isinstance(value, list) else str(value).split(",")
    names = list(dict.fromkeys(str(name).strip() for name in names)) or ["none"]
    for name in names:
        if name == "all":
            raise ValueError("`all` would send to whatever happens to be installed: name them")
        if name not in (*TRACKERS, "none"):
            raise ValueError(f"{name!r} is no tracker{nearest(name, TRACKERS)}; there are: none, {', '.join(TRACKERS)}")
    if "none" in names and len(names) > 1:
        raise ValueError("`none` stands alone")
    return names[0] if len(names) == 1 else names


def check_trackers(report_to: str | list[str]) -> list[str]:
    """The trackers that are sent to. Raises KitError for one that is not installed, or has no login."""
    names = [name for name in ([report_to] if isinstance(report_to, str) else report_to) if name != "none"]
    for name in names:
        modules, packages = TRACKERS[name]
        if not all(any(map(_found, either.split("|"))) for either in modules.split()):
            raise KitError(f"report_to: {name} is not installed",
                           f"{Path(sys.executable).name} -m pip install {packages}, or report_to: none")
        if name in LOGINS and not LOGINS[name][0]():
            raise KitError(f"report_to: {name} has no login here, and a run can't ask for one", LOGINS[name][1])
    return names


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package it lies in is missing or broken
        return False


def _any_set(*variables: str) -> bool:
    return any(os.environ.get(name) for name in variables)


def _wandb() -> bool:
    """https://docs.wandb.ai/guides/track/environment-variables"""
    if _any_set("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_ANONYMOUS") or \
            os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun", "shared"):
        return True
    folders = (Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"),
               Path(os.environ.get("WANDB_DIR") or ".") / "wandb")
    said = "".join(_text(folder.expanduser() / "settings") for folder in folders)
    if any(f"mode = {mode}" in said for mode in ("offline", "disabled")):
        return True
    site = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    return _in_netrc(site, [Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc")])


def _swanlab() -> bool:
    """https://docs.swanlab.cn/en/api/environment-variable.html"""
    root = Path(os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or "~/.swanlab").expanduser()
    return _any_set("SWANLAB_API_KEY") or os.environ.get("SWANLAB_MODE") in ("local", "offline", "disabled") or \
        (root.is_dir() and any(root.iterdir()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _in_netrc(site: str, files: Iterable[Path]) -> bool:
    for file in files:
        try:
            if site in netrc.netrc(file.expanduser()).hosts:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


# Those that ask for a login when a run begins: whether there is one, and how to have one.
LOGINS: dict[str, tuple[Callable[[], bool], str]] = {
    "wandb": (_wandb, "wandb login, or set WANDB_API_KEY; without the net WANDB_MODE=offline"),
    "swanlab": (_swanlab, "swanlab login, or set SWANLAB_API_KEY; without the net SWANLAB_MODE=offline"),
    "comet_ml": (lambda: _any_set("COMET_API_KEY", "COMET_CONFIG") or Path("~/.comet.config").expanduser().is_file()
                 or Path(".comet.config").is_file(), "set COMET_API_KEY"),
    "neptune": (lambda: _any_set("NEPTUNE_API_TOKEN") or os.environ.get("NEPTUNE_MODE") in ("offline", "debug"),
                "set NEPTUNE_API_TOKEN and NEPTUNE_PROJECT; without the net NEPTUNE_MODE=offline"),
    "clearml": (lambda: _any_set("CLEARML_API_ACCESS_KEY", "CLEARML_OFFLINE_MODE", "CLEARML_CONFIG_FILE")
                or Path("~/clearml.conf").expanduser().is_file(),
                "clearml-init, or set CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY"),
    "dagshub": (lambda: _any_set("MLFLOW_TRACKING_URI"), "set MLFLOW_TRACKING_URI, which dagshub.init() prints"),
    "kubeflow": (lambda: _any_set("KUBEFLOW_TRAINER_SERVER_URL"), "it works in a Kubeflow TrainJob only"),
}

"""The hubs that models and data come from: what they hold, and fetching it with their own libraries.

Their methods raise whatever the library raises.
"""

import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import huggingface_hub

from kit.common.errors import KitError
from kit.common.progress import kind


class RemoteFile(NamedTuple):
    """A file on a hub. Its hash is `sha256`, else git's name of it, `blob` (a sha1); of some hubs' files neither."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


class HuggingFace:
    """huggingface.co, or the hub at HF_ENDPOINT."""

    def __init__(self, data: bool, revision: str | None) -> None:
        self.kind, self.revision = "dataset" if data else "model", revision
        self.name = os.environ.get("HF_ENDPOINT") or "Hugging Face"

    def files(self, name: str) -> list[RemoteFile]:
        tree = huggingface_hub.HfApi().list_repo_tree(name, recursive=True, repo_type=self.kind, revision=self.revision)
        return [RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
                for file in tree if isinstance(file, huggingface_hub.RepoFile)]

    def fetch(self, name: str, paths: list[str], folder: Path | None) -> Path:
        return Path(huggingface_hub.snapshot_download(
            name, repo_type=self.kind, revision=self.revision, allow_patterns=paths, local_dir=folder,
            tqdm_class=kind()))

    def address(self, name: str, path: str) -> tuple[str, dict[str, str]]:
        """Where a file lies, and the headers to ask with."""
        token = huggingface_hub.get_token()
        return (huggingface_hub.hf_hub_url(name, path, repo_type=self.kind, revision=self.revision),
                {"authorization": f"Bearer {token}"} if token else {})

    def cached(self, name: str, path: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(name, path, revision=self.revision, repo_type=self.kind)
        return Path(found) if isinstance(found, str) else None

    def cache(self) -> Path:
        return Path(huggingface_hub.constants.HF_HUB_CACHE)

    def similar(self, name: str) -> list[str]:
        """Ids on the hub that are spelt alike."""
        api = huggingface_hub.HfApi()
        search = api.list_datasets if self.kind == "dataset" else api.list_models
        return [found.id for found in search(search=name.rpartition("/")[2], limit=20)]

    def login(self, name: str) -> str:
        prefix = "datasets/" if self.kind == "dataset" else ""
        return (f"look at {huggingface_hub.constants.ENDPOINT}/{prefix}{name} (where it asks for consent, give it "
                "there), then log in: HF_TOKEN in the environment, or `hf auth login`")

    def unreachable(self) -> str:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "unset HF_HUB_OFFLINE"
        return ("is HF_ENDPOINT right? Some mirrors need HF_HUB_DISABLE_XET=1 besides" if os.environ.get("HF_ENDPOINT")
                else "set HF_ENDPOINT to a mirror, such as https://hf-mirror.com") + "; or --hub modelscope"


class ModelScope:
    """modelscope.cn, or the hub at MODELSCOPE_ENDPOINT; the methods are those of HuggingFace."""

    def __init__(self, data: bool, revision: str | None) -> None:
        if importlib.util.find_spec("modelscope") is None:
            raise KitError("--hub modelscope needs the package modelscope",
                           "pip install -r requirements-modelscope.txt")
        self.kind, self.revision = "dataset" if data else "model", revision
        self.name = os.environ.get("MODELSCOPE_ENDPOINT") or "ModelScope"

    def files(self, name: str) -> list[RemoteFile]:
        from modelscope_hub import HubApi

        return [RemoteFile(file.path, file.size, file.sha256 or None, None)
                for file in HubApi().list_repo_files(name, self.kind, revision=self.revision) if not file.is_dir]

    def fetch(self, name: str, paths: list[str], folder: Path | None) -> Path:
        return Path(self._snapshot(name, allow_patterns=paths, **({"local_dir": str(folder)} if folder else {})))

    def address(self, name: str, path: str) -> tuple[str, dict[str, str]]:
        from modelscope_hub import HubApi

        query = urlencode({"Revision": self.revision or "master", "FilePath": path})
        site = HubApi().resolve_endpoint_for_read(name, repo_type=self.kind)
        token = os.environ.get("MODELSCOPE_API_TOKEN")
        return (f"{site}/api/v1/{self.kind}s/{name}/repo?{query}",
                {"authorization": f"Bearer {token}"} if token else {})

    def _snapshot(self, name: str, **options: Any) -> str:
        from modelscope import dataset_snapshot_download, snapshot_download

        download = dataset_snapshot_download if self.kind == "dataset" else snapshot_download
        return str(download(name, revision=self.revision, **options))

    def cached(self, name: str, path: str) -> Path | None:
        with suppress(Exception):  # of its own, for what is not there
            return Path(self._snapshot(name, allow_patterns=[path], local_files_only=True)) / path
        return None

    def cache(self) -> Path:
        return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()

    def similar(self, name: str) -> list[str]:
        return []

    def login(self, name: str) -> str:
        return (f"look at its page, {self.kind}s/{name}, then log in: MODELSCOPE_API_TOKEN in the environment, or "
                "`modelscope login`")

    def unreachable(self) -> str:
        return "look at the network, a proxy, MODELSCOPE_ENDPOINT; or leave --hub out for Hugging Face"


Site = HuggingFace | ModelScope
HUBS: dict[str, type[HuggingFace] | type[ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}

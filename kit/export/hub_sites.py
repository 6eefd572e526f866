"""The hubs a run is pushed to, behind one small interface: who is logged in, is there such a repository, send a folder.

Hugging Face through huggingface_hub, ModelScope through modelscope. Logins are theirs: the environment, or what their
own login command stored. Every error of theirs becomes one KitError.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from kit.common.errors import KitError
from kit.common.files import sha256

QUOTA = (402, 413, 507)
ENDPOINTS = "HF_ENDPOINT (MODELSCOPE_ENDPOINT) and HF_HUB_OFFLINE"


class Site(Protocol):
    """A hub with a login. All methods raise KitError for what the hub refuses and when it can't be reached."""

    address: str  # its name in links and in `ollama run`
    user: str

    def private(self, repo_id: str) -> bool | None:
        """Whether the repository is private; None when there is none."""

    def create(self, repo_id: str, private: bool) -> None:
        """Make the repository, which is not there yet."""

    def upload(self, repo_id: str, folder: Path, message: str) -> bool:
        """Send the files of `folder`; False when the repository holds exactly these already."""

    def url(self, repo_id: str) -> str:
        """The page of the repository."""


class HuggingFace:
    """huggingface.co, or the hub at HF_ENDPOINT."""

    address = "hf.co"

    def __init__(self) -> None:
        if not get_token():
            raise KitError("no login at Hugging Face", "set HF_TOKEN in the environment to a token with write access "
                           "(https://huggingface.co/settings/tokens), or log in once with `hf auth login`")
        self.api = HfApi(library_name="unsloth-kit")
        with told("Hugging Face"):
            self.user = str(self.api.whoami()["name"])

    def private(self, repo_id: str) -> bool | None:
        with told(repo_id):
            try:
                return bool(self.api.repo_info(repo_id).private)
            except RepositoryNotFoundError:
                return None

    def create(self, repo_id: str, private: bool) -> None:
        with told(repo_id):
            self.api.create_repo(repo_id, private=private, exist_ok=True)

    def upload(self, repo_id: str, folder: Path, message: str) -> bool:
        with told(repo_id):
            before = self.api.repo_info(repo_id).sha
            commit = self.api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        return bool(commit.oid != before)

    def url(self, repo_id: str) -> str:
        return f"{self.api.endpoint}/{repo_id}"


class ModelScope:
    """modelscope.cn, or the hub at MODELSCOPE_ENDPOINT."""

    address = "modelscope.cn"

    def __init__(self) -> None:
        try:
            from modelscope_hub import HubApi, HubConfig
        except ImportError:
            raise KitError("hub: modelscope needs the package modelscope", "pip install -U modelscope") from None
        self.config = HubConfig()
        if not self.config.token:
            raise KitError("no login at ModelScope", "set MODELSCOPE_API_TOKEN in the environment "
                           "(https://modelscope.cn/my/myaccesstoken), or log in once with `modelscope login`")
        self.api = HubApi(self.config)
        with told("ModelScope"):
            self.user = str(self.api.whoami().username)

    def private(self, repo_id: str) -> bool | None:
        from modelscope_hub import NotExistError, Visibility

        with told(repo_id):
            try:
                return self.api.get_repo(repo_id, "model").visibility == Visibility.PRIVATE
            except NotExistError:
                return None

    def create(self, repo_id: str, private: bool) -> None:
        with told(repo_id):
            # Without a licence the library would claim Apache-2.0.
            self.api.create_repo(repo_id, "model", visibility="private" if private else "public", license="other")

    def upload(self, repo_id: str, folder: Path, message: str) -> bool:
        with told(repo_id):
            there = {file.path: file.sha256 for file in self.api.list_repo_files(repo_id, "model")}
            if all(there.get(path.name) == sha256(path) for path in folder.iterdir()):
                return False
            self.api.upload_folder(repo_id, "model", folder_path=folder, commit_message=message, use_cache=False)
        return True

    def url(self, repo_id: str) -> str:
        return f"{self.config.endpoint}/models/{repo_id}"


def login(hub: str) -> Site:
    """The hub of the recipe's name (huggingface, modelscope), logged in."""
    return ModelScope() if hub == "modelscope" else HuggingFace()


@contextmanager
def told(where: str) -> Iterator[None]:
    """Whatever a hub's library raises becomes a KitError that says what happened at `where`, and what to do."""
    try:
        yield
    except KitError:
        raise
    except Exception as error:  # two libraries, two HTTP clients and a native one, each with types of its own
        chain = list(_causes(error))
        message, hint = _explained(chain)
        raise KitError(f"push: {where}: {message}", hint) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
    return int(status) if status else None


def _explained(chain: list[BaseException]) -> tuple[str, str]:
    answer = next((one for one in chain if _status(one)), None)
    status = _status(answer) if answer else None
    said = _said(*([answer] if answer else [chain[0], chain[-1]]))
    again = "then push again: what has arrived is not sent twice"
    if status == 401:
        return f"the hub does not take this login (401): {said}", \
            "make a new token with write access and set it in the environment, or log in again"
    if status in QUOTA or "storage limit" in said.lower() or "quota" in said.lower():
        return f"the account has no room for it: {said}", f"free room on the hub or push less (--what), {again}"
    if status == 403:
        return f"this login may not write there (403): {said}", \
            "use a token with write access to that user or organisation, or another hub_model_id"
    if status is not None:
        return f"the hub refused ({status}): {said}", f"wait a little, {again}" if status >= 429 else \
            "mend what it names; the run's own files are as they were"
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in chain):
        return f"the disk is full: {said}", f"free room, {again}"
    if any(_unreachable(one) for one in chain):
        return f"the hub can't be reached: {said}", f"look at the network, a proxy, {ENDPOINTS}, {again}"
    return f"{type(chain[0]).__name__}: {said}", f"mend that, {again}"


def _unreachable(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) or bool(names & {"TransportError", "RequestException"})


def _said(*errors: BaseException) -> str:
    """One line of some errors, without the signatures that addresses of an upload carry, and without tokens."""
    told = dict.fromkeys(" ".join(str(error).split()) or type(error).__name__ for error in errors)
    text = re.sub(r"\?\S+", "?…", ": ".join(told))
    for name, value in os.environ.items():
        if name.endswith("_TOKEN") and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return text[:300]

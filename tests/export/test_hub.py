"""Pushing with the real client of the Hugging Face hub to a stand-in on this machine: what arrives, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import GateError, KitError
from kit.common.files import cache_dir, sha256, write_json
from kit.export.hub import push, repositories
from kit.export.hub_card import STARTER_ID
from kit.gguf.formats import quantization_of
from kit.runs.gates import Gates
from kit.runs.provenance import seal
from kit.runs.run import Run
from support.command import PROJECT, kit
from support.hub_stand_in import TOKEN, USER, HubStandIn, serving, use
from support.small_run import small_run, verdict, verified

pytestmark = pytest.mark.slow

KINDS = {"adapter": f"{USER}/quickstart-lora", "merged": f"{USER}/quickstart", "gguf": f"{USER}/quickstart-GGUF"}


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


# A whole run, by the command


@pytest.fixture(scope="module")
def pushed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubStandIn, Run, str]]:
    """`kit push` of a finished run: the hub afterwards, the run, what was printed."""
    folder = tmp_path_factory.mktemp("hub")
    with serving(folder) as hub:
        before = tree(finished_run)
        done = kit("push", str(finished_run), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1",
                   HF_HOME=str(folder))
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert tree(finished_run) == before
        yield hub, Run.open(finished_run), done.stdout
        shutil.rmtree(hub.blobs)


def test_each_kind_has_a_private_repository(pushed: tuple[HubStandIn, Run, str]) -> None:
    hub, _, said = pushed
    assert {name: found.private for name, found in hub.repositories.items()} == dict.fromkeys(KINDS.values(), True)
    for name in KINDS.values():
        assert f"{hub.url}/{name}\n" in said


def test_what_arrives_is_what_was_verified_and_nothing_else(pushed: tuple[HubStandIn, Run, str]) -> None:
    hub, run, _ = pushed
    added = {"adapter": set(), "merged": set(), "gguf": {"template", "params"}}
    for kind, name in KINDS.items():
        own = {path.name for path in (run.folder / kind).iterdir()}
        assert set(hub.repositories[name].files) == own | {"README.md"} | added[kind]
        for path in own - {"README.md", "adapter_config.json"}:
            assert hub.repositories[name].files[path] == sha256(run.folder / kind / path), path
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert json.loads(hub.content(KINDS["adapter"], "adapter_config.json")) == {
        **config, "base_model_name_or_path": STARTER_ID}


def test_ollama_gets_the_template_of_the_modelfile(pushed: tuple[HubStandIn, Run, str]) -> None:
    hub, run, _ = pushed
    modelfile = (run.gguf / "Modelfile").read_text()
    template = hub.content(KINDS["gguf"], "template").decode()
    assert f'TEMPLATE """{template}"""' in modelfile
    assert json.loads(hub.content(KINDS["gguf"], "params")) == {
        "stop": re.findall('PARAMETER stop "(.*)"', modelfile), "num_ctx": run.recipe.num_ctx}


def test_no_path_of_this_machine_arrives_and_no_token(pushed: tuple[HubStandIn, Run, str]) -> None:
    hub, run, _ = pushed
    for words in (run.folder, PROJECT, cache_dir(), Path.home(), Path(tempfile.gettempdir()), TOKEN):
        assert hub.holds(str(words).encode()) == [], words


@pytest.mark.parametrize("kind, library, base", [
    ("adapter", "peft", STARTER_ID), ("merged", "transformers", STARTER_ID), ("gguf", "gguf", KINDS["merged"])])
def test_the_card_holds_the_verdict(pushed: tuple[HubStandIn, Run, str], kind: str, library: str, base: str) -> None:
    from huggingface_hub import ModelCard

    hub, run, _ = pushed
    card = ModelCard(hub.content(KINDS[kind], "README.md").decode())
    assert (card.data.library_name, card.data.base_model, card.data.license) == (library, base, None)
    assert {"unsloth", "lora"} <= set(card.data.tags)
    verdict = json.loads((run.folder / "verify.json").read_text())
    for gate in verdict["gates"]:
        figure = gate["figure"].replace("|", "\\|")
        assert f"| {gate['name']} | {figure} |" in card.text
    assert "<|im_start|>user\nYour question<|im_end|>" in card.text and "learning_rate: 0.001" in card.text
    assert "kit verify quickstart" in card.text
    if kind == "gguf":
        for path in run.gguf.glob("*.gguf"):
            assert f"ollama run hf.co/{KINDS['gguf']}:{quantization_of(path).upper()}\n" in card.text


def test_what_was_pushed_loads_and_answers_alike(pushed: tuple[HubStandIn, Run, str], starter: Path,
                                                 tmp_path: Path) -> None:
    import torch
    from huggingface_hub import snapshot_download
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub, run, _ = pushed
    fetched = {kind: snapshot_download(KINDS[kind], endpoint=hub.url, token=TOKEN, cache_dir=tmp_path)
               for kind in ("adapter", "merged")}
    ids = AutoTokenizer.from_pretrained(fetched["adapter"])("A ticket about a kettle", return_tensors="pt")
    own = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(fetched["merged"], dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    with torch.no_grad():
        logits = own(**ids).logits
        untrained = base(**ids).logits
        assert torch.equal(merged(**ids).logits, logits)
        adapted = PeftModel.from_pretrained(base, fetched["adapter"])(**ids).logits
    # The merge rounds to bfloat16, the adapter does not.
    assert (adapted - logits).abs().max() < 0.1 * (untrained - logits).abs().max()


def test_pushing_again_sends_nothing(pushed: tuple[HubStandIn, Run, str], monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub, run, _ = pushed
    use(monkeypatch, hub.url, TOKEN, tmp_path)
    large, commits = hub.sent("/object/"), hub.sent("/commit/")
    assert large > 5e8
    assert push(run, list(KINDS)) == [f"{hub.url}/{name}" for name in KINDS.values()]
    assert (hub.sent("/object/"), hub.sent("/commit/")) == (large, commits)
    assert capsys.readouterr().out.count("already there, nothing sent") == 3


# A small run, and all that can be wrong


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serving(tmp_path / "hub") as found:
        use(monkeypatch, found.url, TOKEN, tmp_path)
        yield found








@pytest.fixture
def run(tmp_path: Path, starter: Path) -> Run:
    return small_run(tmp_path, starter)


def refused(run: Run, hub: HubStandIn, *words: str, gate: bool = False, **options: Any) -> str:
    """The push is refused with these words, which are returned, and no repository gets a file."""
    with pytest.raises(KitError) as error:
        push(run, options.pop("what", ["adapter"]), **options)
    assert isinstance(error.value, GateError) == gate and error.value.hint
    for word in words:
        assert word in str(error.value)
    assert hub.sent("/commit/") == 0 and not any(found.files for found in hub.repositories.values())
    return str(error.value)


def test_nothing_to_push_asks_nobody(run: Run, hub: HubStandIn) -> None:
    hub.trouble["/"] = (500, "asked")
    assert push(run) == []


def test_the_recipe_says_what_where_and_how(tmp_path: Path, starter: Path, hub: HubStandIn) -> None:
    run = small_run(tmp_path, starter, push_to_hub=["adapter"], hub_model_id="zoo/lions", hub_private_repo=False)
    assert push(run) == [f"{hub.url}/zoo/lions-lora"]
    assert hub.repositories["zoo/lions-lora"].private is False


def test_the_call_outranks_the_recipe(run: Run, hub: HubStandIn) -> None:
    assert push(run, ["adapter"], repo_id="tigers-lora", private=False) == [f"{hub.url}/{USER}/tigers-lora"]
    assert hub.repositories[f"{USER}/tigers-lora"].private is False


def test_the_4bit_model_is_pushed_with_its_card_and_loads(
        tmp_path: Path, starter: Path, tiny_starter: Path, hub: HubStandIn) -> None:
    import torch
    from huggingface_hub import ModelCard, snapshot_download
    from transformers import AutoModelForCausalLM

    from kit.export.adapter import save_4bit

    run = small_run(tmp_path, starter, push_to_hub=["merged-4bit"])
    shutil.copytree(tiny_starter, run.merged)
    save_4bit(run.merged, run.merged_4bit, run.recipe)
    seal(run)
    gates = Gates("verify")
    gates.check("parity merged", True, "KL 0")
    verdict(run, gates)
    refused(run, hub, "verified merged-4bit", "has not compared merged-4bit", gate=True, what=None)
    gates.check("parity merged-4bit", True, "KL 0.006")
    verdict(run, gates)
    assert push(run) == [f"{hub.url}/{USER}/cats-bnb-4bit"]
    name = f"{USER}/cats-bnb-4bit"
    assert set(hub.repositories[name].files) == {path.name for path in run.merged_4bit.iterdir()} | {"README.md"}
    card = ModelCard(hub.content(name, "README.md").decode())
    assert (card.data.library_name, card.data.base_model) == ("transformers", STARTER_ID)
    assert "bitsandbytes" in card.data.tags and "| parity merged-4bit | KL 0.006 |" in card.text
    assert hub.holds(str(tmp_path).encode()) == []
    fetched = snapshot_download(name, endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        own, theirs = (AutoModelForCausalLM.from_pretrained(place, device_map="cpu")(ids).logits
                       for place in (run.merged_4bit, fetched))
    assert torch.equal(own, theirs)
    assert push(run, ["merged", "merged-4bit"])[1] == f"{hub.url}/{name}"
    assert f"base_model: {USER}/cats\n" in hub.content(name, "README.md").decode()


def test_what_is_not_there_is_refused(run: Run, hub: HubStandIn) -> None:
    refused(run, hub, "holds no merged, gguf", "it holds: adapter", what=["adapter", "merged", "gguf"])
    refused(run, hub, "no artefact 'checkpoints'", what=["checkpoints"])


def test_a_name_that_hubs_do_not_take_is_refused(run: Run, hub: HubStandIn) -> None:
    refused(run, hub, f"{USER}/猫-lora is no name", "hub_model_id", repo_id="猫")
    assert repositories("me/cats-GGUF", "cat", ["merged", "gguf"]) == {"merged": "me/cats", "gguf": "me/cats-GGUF"}


def test_a_base_model_from_a_folder_is_named_without_its_path(tmp_path: Path, starter: Path, hub: HubStandIn) -> None:
    base = tmp_path / "my-base"
    base.mkdir()
    run = small_run(tmp_path, base_folder_of(starter, base), model_name=str(base),
                    dataset=["someone/cats", str(tmp_path / "secret-place" / "rows.jsonl")])
    push(run, ["adapter"])
    name = f"{USER}/cats-lora"
    card = hub.content(name, "README.md").decode()
    assert json.loads(hub.content(name, "adapter_config.json"))["base_model_name_or_path"] == "my-base"
    assert "base_model:" not in card and "datasets:\n- someone/cats\n---" in card and "- rows.jsonl" in card
    assert hub.holds(b"secret-place") == [] and hub.holds(str(tmp_path).encode()) == []

    push(run, ["adapter"], base_model="Qwen/Qwen3-4B")
    assert json.loads(hub.content(name, "adapter_config.json"))["base_model_name_or_path"] == "Qwen/Qwen3-4B"
    assert "base_model: Qwen/Qwen3-4B\n" in hub.content(name, "README.md").decode()
    with pytest.raises(KitError, match="is no hub id"):
        push(run, ["adapter"], base_model=str(base))


def base_folder_of(starter: Path, base: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(starter / name, base / name)
    return base


def test_only_what_was_verified_is_pushed(run: Run, hub: HubStandIn) -> None:
    gates = Gates("verify")
    gates.check("parity f16", True, "KL 0")
    verdict(run, gates)
    refused(run, hub, "verified adapter", f"kit verify {run.folder}", gate=True)
    gates.check("merge", False, "3 tensors", "added once", "a tensor is lost")
    verdict(run, gates)
    refused(run, hub, "verified: FAILED: merge", gate=True)
    (run.folder / "verify.json").unlink()
    refused(run, hub, "there is no verdict", f"kit verify {run.folder}", gate=True)


def test_what_was_changed_since_is_refused(run: Run, hub: HubStandIn) -> None:
    (run.adapter / "chat_template.jinja").write_text("{{ messages }}")
    refused(run, hub, "sha256: adapter/chat_template.jinja is changed since the run", gate=True)
    seal(run)
    refused(run, hub, "sealed again after kit verify", f"kit verify {run.folder}", gate=True)


@pytest.mark.parametrize("key, value, words", [
    ("note", "hf_" + "Abc1" * 9, "secrets: adapter_config.json holds Hugging Face token hf_A…"),
    ("trained_in", str(PROJECT / "runs"), f"paths: adapter_config.json holds {PROJECT}"),
])
def test_a_secret_or_a_path_is_refused(run: Run, hub: HubStandIn, key: str, value: str, words: str) -> None:
    write_json(run.adapter / "adapter_config.json", {"r": 16, key: value})
    verified(run)
    refused(run, hub, words, gate=True)


# The login and the hub


def test_without_a_login_both_ways_are_named(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(run, hub, "no login at Hugging Face", "HF_TOKEN", "`hf auth login`")
    assert hub.received == []


def test_the_hubs_own_login_is_taken(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch,
                                     tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    assert push(run, ["adapter"]) == [f"{hub.url}/{USER}/cats-lora"]


def test_a_login_that_has_ended_is_told(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ended12345678")
    refused(run, hub, "does not take this login (401)", "token with write access")


@pytest.mark.parametrize("path, status, said, words", [
    ("/api/repos/create", 403, "You don't have the rights to create a model", "may not write there (403): "),
    ("/preupload/", 403, "Private repository storage limit reached", "no room for it"),
    ("/object/", 413, "Payload Too Large", "no room for it"),
    ("/commit/", 503, "The hub is being repaired", "the hub refused (503): "),
])
def test_what_the_hub_refuses_is_told_in_its_words(run: Run, hub: HubStandIn, path: str, status: int, said: str,
                                                   words: str) -> None:
    before = tree(run.folder)
    hub.trouble[path] = (status, said)
    told = refused(run, hub, words, said)
    assert "signature" not in told and TOKEN not in told
    assert tree(run.folder) == before
    hub.trouble.clear()
    large = hub.sent("/object/")
    assert push(run, ["adapter"]) == [f"{hub.url}/{USER}/cats-lora"]
    if path == "/commit/":
        assert hub.sent("/object/") == large > 0  # what had arrived was not sent twice


def test_a_cut_connection_is_tried_again(run: Run, hub: HubStandIn) -> None:
    hub.trouble["/object/"], hub.once = None, True
    push(run, ["adapter"])
    assert hub.trouble == {} and hub.sent("/object/") == (run.adapter / "adapter_model.safetensors").stat().st_size


def test_a_hub_that_is_not_there_is_told(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch,
                                         tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    use(monkeypatch, f"http://127.0.0.1:{port}", TOKEN, tmp_path)
    refused(run, hub, "can't be reached", "HF_ENDPOINT", "push again")


def test_a_full_disk_is_told(run: Run, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    refused(run, hub, "can't be written: No space left on device", "TMPDIR")


def test_nobody_publishes_by_accident(run: Run, hub: HubStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    push(run, ["adapter"], private=False)
    (url,) = [f"{hub.url}/{name}" for name in hub.repositories]
    with pytest.raises(KitError, match=r"is public[\s\S]*--public"):
        push(run, ["adapter"])
    assert push(run, ["adapter"], private=False) == [url]
    hub.repositories[f"{USER}/cats-lora"].private = True
    push(run, ["adapter"], private=False)
    assert "is private and stays so" in capsys.readouterr().out and hub.repositories[f"{USER}/cats-lora"].private


def test_a_repository_that_does_not_become_private_gets_nothing(run: Run, hub: HubStandIn) -> None:
    hub.overruled = True
    refused(run, hub, "was made, but not private")

"""What a verdict is worth: a stranger's folder runs no code, an unfinished check leaves no verdict, a seal holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import kit
from kit.common.errors import GateError, KitError
from kit.export.command import export
from kit.export.hub import push
from kit.runs.gates import Gates
from kit.runs.provenance import check_hashes
from kit.runs.run import Run
from kit.verifying.verify import verify
from support.command import PROJECT
from support.command import kit as command
from support.sabotage import copy_run, edit_json, edit_text, replace

pytestmark = pytest.mark.slow

F16, Q8_0, MODELFILE = "gguf/tiny-f16.gguf", "gguf/tiny-q8_0.gguf", "gguf/Modelfile"
SHIPPED = (F16, Q8_0, MODELFILE)
CONSENT = "needs Python code that came with it, and that is not run without your consent"


def verdict(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "verify.json").read_text(encoding="utf-8")))


def page(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


# Consent


@pytest.fixture
def booby(sure_run: Path, tmp_path: Path) -> tuple[Run, Path]:
    """(a run that tries to run code by its recipe, configs and tokenizers; the file that tells when it did)."""
    run, marker = copy_run(sure_run, tmp_path), tmp_path / "marker"
    for folder in (run.adapter, run.merged):
        (folder / "planted.py").write_text(f"open({str(marker)!r}, 'a').write('{folder.name} ')\n")
        edit_json(folder / "tokenizer_config.json", tokenizer_class="Planted",
                  auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]})
    edit_json(run.merged / "config.json", auto_map={"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"})
    edit_text(run.folder / "recipe.yaml", "trust_remote_code: false", "trust_remote_code: true")
    return run, marker


def test_after_a_wrong_hash_nothing_is_loaded(booby: tuple[Run, Path]) -> None:
    run, marker = booby
    gates = verify(run.folder)
    assert [gate.name for gate in gates.failed] == ["sha256"]
    assert "recipe.yaml is changed since the run" in gates.failed[0].detail
    last = gates.gates[-1]
    assert (last.passed, last.figure, last.detail) == (None, "not checked", "the files are not those of the run")
    assert verdict(run)["passed"] is False and "FAILED: sha256" in page(run)
    assert not marker.exists()
    with pytest.raises(KitError, match=r"recipe\.yaml is changed since the run: nothing is made from it"):
        export(str(run.folder), None, ["q8_0"], None, None)


def asked(engine: str) -> Callable[[Run], object]:
    def ask(run: Run) -> None:
        file = run.folder.parent / "asked.txt"
        file.write_text("Where is parcel 12?\n")
        kit.answer_file(run.folder, file, engine=engine, overwrite=True)

    ask.__name__ = f"ask_{engine}"
    return ask


def merge_again(run: Run) -> None:
    export(str(run.folder), None, [], "16bit", None)


def to_4bit(run: Run) -> None:
    export(str(run.folder), None, [], "4bit", None)


def convert(run: Run) -> None:
    export(str(run.folder), None, ["f16"], None, None)


@pytest.mark.parametrize("use", [verify, asked("merged"), asked("adapter"), merge_again, to_4bit, convert],
                         ids=lambda use: use.__name__)
def test_no_code_of_a_folder_runs_without_the_callers_consent(use: Callable[[Any], object], booby: tuple[Run, Path],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed by whoever planted it, so that the hashes are right."""
    run, marker = booby
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where nobody decided
    kit.seal(run)
    with suppress(KitError):  # where the code is needed
        use(run.folder if use is verify else run)
    assert not marker.exists()


def test_the_refusal_names_the_consent_and_the_consent_counts(booby: tuple[Run, Path]) -> None:
    run, marker = booby
    edit_json(run.merged / "config.json", model_type="planted")
    kit.seal(run)
    [gate] = verify(run.folder).failed
    assert gate.name == "reference" and gate.detail == f"{run.adapter} {CONSENT}"
    assert "--trust-remote-code" in gate.hint
    for arguments in (("ask", str(run.folder), "Where?", "--engine", "merged"),
                      ("export", str(run.folder), "--save-merged", "16bit")):
        done = command(*arguments)
        assert done.returncode == 2 and CONSENT in done.stderr and "--trust-remote-code" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert not marker.exists()
    verify(run.folder, trust_remote_code=True)
    assert marker.read_text() == "adapter "
    command("ask", str(run.folder), "Where?", "--engine", "merged", "--trust-remote-code")
    assert marker.read_text() == "adapter merged "


def test_the_converter_runs_no_code_either(sure_run: Path, tmp_path: Path) -> None:
    """llama.cpp's converter loads some tokenizers with trust_remote_code=True; what it reads must not name any code."""
    from kit.gguf.convert import _without_code

    run = copy_run(sure_run, tmp_path)
    assert _without_code(run.merged, tmp_path / "view") == run.merged, "as it is where no code is named"
    (run.merged / "planted.py").write_text("")
    edit_json(run.merged / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.T", None]})
    view = _without_code(run.merged, tmp_path / "view")
    assert {path.name for path in view.iterdir()} == {path.name for path in run.merged.iterdir()} - {"planted.py"}
    assert "auto_map" not in (view / "tokenizer_config.json").read_text()
    assert (view / "model.safetensors").samefile(run.merged / "model.safetensors")


@pytest.mark.parametrize("engine", ["merged", "adapter"])
def test_pickled_weights_are_refused(engine: str, sure_run: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    run = copy_run(sure_run, tmp_path, without=SHIPPED)
    for weights, pickled in ((run.merged / "model.safetensors", "pytorch_model.bin"),
                             (run.adapter / "adapter_model.safetensors", "adapter_model.bin")):
        torch.save(load_file(weights), weights.with_name(pickled))
        weights.unlink()
    with pytest.raises(KitError, match=r"model\.safetensors"):
        asked(engine)(run)


# The verdict while it is not known


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_verify_that_is_ended_leaves_no_verdict(number: signal.Signals, sure_run: Path, tmp_path: Path) -> None:
    run = copy_run(sure_run, tmp_path, without=SHIPPED)
    kit.seal(run)
    assert verdict(run)["passed"] is True and "VERIFIED" in page(run)
    with subprocess.Popen([sys.executable, "-m", "kit", "verify", str(run.folder)], cwd=PROJECT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while ": adapter …" not in (line := process.stdout.readline()):
            assert line, process.communicate()[1]
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    found, why = verdict(run), "not finished"
    if number == signal.SIGINT:
        assert process.returncode == 130 and "kit: interrupted" in said
        why = "could not be verified: interrupted"
    assert found["passed"] is None and found["verdict"].startswith(why)
    assert "VERIFIED" not in page(run) and "not verified:" in page(run) and why in page(run)
    assert not list(run.folder.rglob("*.partial"))
    withdrawn_is_not_pushed(run, why)


def withdrawn_is_not_pushed(run: Run, why: str) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(GateError, match=f"verified: {why}"):
        patch.setattr("kit.export.hub.login", lambda hub: type("Site", (), {"user": "cat"}))
        push(run, ["adapter"])


def test_what_can_not_be_verified_says_so_in_place_of_the_old_verdict(sure_run: Path, tmp_path: Path) -> None:
    run = copy_run(sure_run, tmp_path)
    (run.folder / "manifest.json").unlink()
    assert [gate.name for gate in verify(run.folder).failed] == ["sha256"]
    assert verdict(run)["passed"] is False and "VERIFIED" not in page(run)

    run = copy_run(sure_run, tmp_path / "another")
    for made in (run.adapter, run.merged):
        made.rename(tmp_path / made.name)
    assert command("verify", str(run.folder)).returncode == 2
    assert verdict(run)["passed"] is None
    assert verdict(run)["verdict"].startswith(f"could not be verified: {run.folder} holds no trained model")
    assert "could not be verified" in page(run) and "VERIFIED" not in page(run)


def test_a_machine_that_is_refused_is_no_failure_of_the_run(sure_run: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy_run(sure_run, tmp_path)

    def refused() -> None:
        raise KitError("Tesla P100 has compute capability 6.0", "use a newer GPU")

    monkeypatch.setattr("kit.recipe.machine._hardware", refused)
    with pytest.raises(KitError, match="compute capability 6"):
        verify(run.folder)
    assert verdict(run)["passed"] is None and verdict(run)["gates"] == []
    assert verdict(run)["verdict"].startswith("could not be verified: Tesla P100")


def test_a_bug_in_the_kit_withdraws_the_verdict_too(sure_run: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy_run(sure_run, tmp_path)
    monkeypatch.setattr("kit.verifying.verify._check_all", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        verify(run)
    assert verdict(run)["verdict"] == "could not be verified: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("also_read_only", [False, True])
def test_a_folder_that_can_not_be_written(also_read_only: bool, sure_run: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the old verdict is deleted; in a read-only folder it stays, and that is said."""
    run = copy_run(sure_run, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system") if also_read_only else OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    if also_read_only:
        monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KitError) as error:
        verify(run)
    assert error.value.message.startswith(f"nothing was checked: {run.folder / 'verify.json'} can't be written: ")
    assert "make it writable, or free room there" in error.value.hint
    for name in ("verify.json", "report.html"):
        assert (run.folder / name).exists() is also_read_only
    assert ("verify.json and report.html in it could not be withdrawn" in error.value.message) is also_read_only


# The seal


def changed(run: Run) -> str:
    gates = Gates("")
    check_hashes(gates, run)
    return gates.gates[0].detail


def test_log_and_figures_are_sealed(sure_run: Path, tmp_path: Path) -> None:
    run = copy_run(sure_run, tmp_path)
    assert changed(run) == ""
    edit_json(run.folder / "result.json", verdict="?", files={}, finished="later", seconds={}, peak_memory_gb=0)
    assert changed(run) == "", "what is written after the seal"
    replace(run.log, run.log.read_text().replace('"loss"', '"less"', 1))
    assert changed(run) == "log.jsonl is changed since the run"
    result = json.loads((run.folder / "result.json").read_text())
    result["gates"]["before training"][0].update(passed=True, figure="all of them")
    edit_json(run.folder / "result.json", score_after={"exact": 1.0}, gates=result["gates"],
              train={**result["train"], "steps": 10**6})
    assert changed(run) == ("log.jsonl is changed since the run; result.json#gates is changed since the run; "
                            "result.json#train is changed since the run")
    del result["gates"], result["score_after"]
    replace(run.folder / "result.json", json.dumps(result))
    assert "result.json#gates is gone" in changed(run)


def test_a_run_sealed_by_an_earlier_version_is_still_whole(sure_run: Path, tmp_path: Path) -> None:
    run = copy_run(sure_run, tmp_path)
    sealed = json.loads((run.folder / "manifest.json").read_text())["artefacts"]
    older = {name: digest for name, digest in sealed.items() if "#" not in name and name != "log.jsonl"}
    assert len(older) == len(sealed) - 11
    edit_json(run.folder / "manifest.json", artefacts=older)
    assert changed(run) == ""


# Export makes right


def damage(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    replace(path, bytes(whole))


def test_export_makes_again_what_is_wrong_and_blesses_nothing_else(sure_run: Path, tmp_path: Path) -> None:
    run = copy_run(sure_run, tmp_path)
    damage(run.folder / Q8_0)
    damage(run.merged / "model.safetensors")
    [gate] = verify(run.folder).failed
    assert gate.hint == "kit export RUN makes them again"
    f16 = (run.folder / F16).stat().st_mtime_ns
    done = command("export", str(run.folder))
    assert done.returncode == 0, done.stderr
    assert "merged " in done.stdout and "tiny-q8_0.gguf " in done.stdout and "Modelfile " in done.stdout
    assert (run.folder / F16).stat().st_mtime_ns == f16, "it was right"
    assert changed(run) == ""

    replace(run.log, "{}\n")
    (run.gguf / "tiny-q4_k_m.gguf").write_bytes(b"GGUF")
    assert command("export", str(run.folder), "--gguf", "q8_0").returncode == 0
    assert changed(run) == "log.jsonl is changed since the run; gguf/tiny-q4_k_m.gguf is not made by the run"
    (run.gguf / "tiny-q4_k_m.gguf").unlink()
    damage(run.adapter / "adapter_model.safetensors")
    with pytest.raises(KitError, match=r"adapter_model\.safetensors is changed since the run: nothing is made"):
        export(str(run.folder), None, [], None, None)


def test_what_is_named_is_made_again_and_the_modelfile_follows(sure_run: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_run(sure_run, tmp_path)
    replace(run.folder / MODELFILE, "FROM ./nothing.gguf\n")
    times = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    export(str(run.folder), None, ["f16"], None, None)
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == {
        run.folder / F16, run.folder / MODELFILE, run.folder / "manifest.json"}
    assert "FROM ./tiny-f16.gguf\n" in (run.folder / MODELFILE).read_text()
    assert "nothing.gguf" in capsys.readouterr().out, "that the Modelfile names another file is said"
    assert changed(run) == ""
    before = (run.folder / F16).read_bytes()
    monkeypatch.setattr("kit.gguf.convert._run", lambda *_: (_ for _ in ()).throw(GateError("no converter")))
    with pytest.raises(GateError):
        export(str(run.folder), None, ["f16"], None, None)
    assert (run.folder / F16).read_bytes() == before, "nothing is lost when it fails"


def test_the_remedy_that_a_gate_names_mends_it(sure_run: Path, tmp_path: Path) -> None:
    """Wrong from the start, so sealed as it is: a stop token and the Modelfile."""
    run = copy_run(sure_run, tmp_path)
    edit_json(run.merged / "generation_config.json", eos_token_id=151643)
    edit_text(run.folder / MODELFILE, "FROM ./tiny-q8_0.gguf", "FROM ./tiny-q4_k_m.gguf")
    kit.seal(run)
    found = {gate.name: gate.hint for gate in verify(run.folder).failed}
    assert found == {"stop token": "kit export RUN --save-merged 16bit",
                     "template Modelfile": "kit export RUN makes what is missing, and the Modelfile"}
    for arguments in ((), ("--save-merged", "16bit")):
        done = command("export", str(run.folder), *arguments)
        assert done.returncode == 0, done.stderr
    gates = verify(run.folder)
    assert gates.passed, gates

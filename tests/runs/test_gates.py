"""Gate and Gates themselves: what passes, what a failure says, and how a stage's gates are shown and kept."""

from __future__ import annotations

import json

import pytest

from kit.common.errors import GateError, KitError
from kit.runs.gates import Gate, Gates
from support.command import PROJECT


def some() -> Gates:
    gates = Gates("stage")
    gates.check("good", True, "3 of 3", "all", "a remark", "never said")
    gates.check("told", None, "7", detail="a figure only")
    return gates


def test_a_check_says_whether_it_failed() -> None:
    gates = Gates("stage")
    assert gates.check("a", True, "1") is True
    assert gates.check("b", None, "1") is True, "what does not apply does not fail"
    assert gates.check("c", False, "1") is False
    assert [gate.sign for gate in gates.gates] == ["✓", "–", "✗"]
    assert (gates.passed, [gate.name for gate in gates.failed]) == (False, ["c"])


def test_a_page_folds_gates_and_opens_itself_when_one_failed() -> None:
    gates = some()
    assert gates._repr_html_().startswith(f"<details><summary><b>stage: {gates.verdict}</b></summary>")
    gates.check("<bad>", False, "0")
    page = gates._repr_html_()
    assert page.startswith("<details open>") and "&lt;bad&gt;" in page and "<bad>" not in page
    assert all(gate.name in repr(gates) for gate in gates.gates), "text is complete"


def test_gates_that_passed_let_the_run_go_on() -> None:
    assert some().passed and some().failed == []
    some().require()
    Gates("empty").require()


def test_a_failure_names_every_failed_gate_with_its_cause() -> None:
    gates = some()
    gates.check("no cause", False, "12.5", "at most 3")
    gates.check("cause", False, "0", "all", "nothing was there", "put something there")
    gates.check("another", False, "1", "2", "too few", "add one")
    with pytest.raises(GateError) as error:
        gates.require()
    assert error.value.message == ("stage: 3 of 5 gates failed: no cause: 12.5, allowed at most 3; "
                                   "cause: nothing was there; another: too few")
    assert error.value.hint == "put something there", "the first remedy there is"
    assert error.value.exit_code == 1


def test_an_error_becomes_a_failed_gate_with_its_cause() -> None:
    gates = Gates("stage")
    with gates.guard("file"):
        raise KitError("m.gguf is cut short", "export again")
    with gates.guard("fine"):
        pass
    with pytest.raises(KeyboardInterrupt), gates.guard("interrupted"):
        raise KeyboardInterrupt
    with gates.guard("another", "kit export RUN"):
        raise KitError("m.gguf is cut short", "export again")
    assert [gate.name for gate in gates.failed] == ["file", "another"], "nothing else was added"
    assert gates.gates[0] == Gate("file", False, "failed", "", "m.gguf is cut short", "export again")
    assert gates.gates[1].hint == "kit export RUN", "who guards knows the remedy better"


def test_an_error_that_nobody_foresaw_is_told_as_such_with_its_traceback() -> None:
    gates = Gates("stage")
    with gates.guard("config"):
        json.loads("{")
    with gates.guard("labels", kept_in="result.json"):
        len(7)  # type: ignore[arg-type]
    first, second = gates.failed
    assert first.detail.startswith("unexpected error in this check: JSONDecodeError: Expecting")
    assert second.detail == ("unexpected error in this check: TypeError: object of type 'int' has no len(); this is a "
                             "bug or a damaged file, the traceback is in result.json")
    assert first.hint and "damaged" not in first.hint
    kept = json.loads(json.dumps(gates.as_json()))
    assert "Traceback" in kept[1]["traceback"] and "len(7)" in kept[1]["traceback"]
    assert Gates.from_json("stage", kept).gates == gates.gates
    assert "Traceback" not in repr(gates)


def test_the_verdict() -> None:
    gates = Gates("stage")
    assert gates.verdict == "0 gates passed"
    gates.check("a", True, "1")
    gates.check("told", None, "1")
    assert gates.verdict == "1 gate passed"
    gates.check("b", True, "1")
    assert gates.verdict == "all 2 gates passed"
    gates.check("c", False, "1")
    gates.check("d", False, "1")
    assert gates.verdict == "FAILED: c, d (2 gates passed)"


def test_kept_as_json_and_read_again() -> None:
    gates = some()
    gates.check("c", False, "0", "all", "Ursache: 原因", "hint")
    again = Gates.from_json("stage", json.loads(json.dumps(gates.as_json())))
    assert again.gates == gates.gates and again.title == gates.title
    assert repr(again) == repr(gates)
    assert gates.as_json()[0] == {"name": "good", "passed": True, "figure": "3 of 3", "tolerance": "all",
                                  "detail": "a remark", "hint": "never said"}


def test_the_table_shows_figures_and_the_remedy_of_failures_only() -> None:
    gates = some()
    gates.check("c", False, "<0>", "all", "no <b>", "do this")
    text, page = repr(gates), gates._repr_html_()
    for shown in (text, page):
        assert "FAILED: c" in shown and "3 of 3" in shown and "do this" in shown
        assert "never said" not in shown
    assert "<0>" in text and "&lt;0&gt;" in page and "no <b>" not in page


def test_the_page_of_gates_has_the_tolerances_of_the_code() -> None:
    from kit.gguf import formats
    from kit.verifying import answers, noise, parity

    page = " ".join((PROJECT / "docs" / "gates.md").read_text(encoding="utf-8").split())
    for said in (f"{parity.SPREAD:g} times", f"{parity.FLIP:g} times", f"{100 * parity.SHARE:g} %",
                 f"{answers.ENDS:g} times", f"1 in {1 / answers.ALPHA:g}", f"{answers.ENOUGH} rows"):
        assert said in page, said
    names = ["FLOAT32", "FLOAT16", "BFLOAT16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K"]
    assert {getattr(formats, name) for name in names} == set(noise.ROUNDING)
    for name in names:
        assert f"| {name} | {100 * noise.ROUNDING[getattr(formats, name)]:.3g} % |" in page, name

"""The bundled tickets: what the script writes, and nothing held out was seen in training."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[2] / "data"
FIELDS = ["order", "product", "topic"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tickets", DATA / "make_tickets.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tickets"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()
Row = dict[str, str]


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return read(script.TRAIN_FILE)


@pytest.fixture(scope="module")
def held_out() -> list[Row]:
    return read(script.HELDOUT_FILE)


def words(sentence: str) -> str:
    """A sentence with slots, case and punctuation gone."""
    return " ".join(re.findall(r"[a-z']+|_+", sentence.lower()))


def masked_sentences(row: Row) -> set[str]:
    """The sentences of a ticket with its product and its numbers blanked out, read from the text alone."""
    product = json.loads(row["output"])["product"]
    text = row["input"].replace(product, "_") if product else row["input"]
    text = re.sub(r"\d+", "_", text.replace("Order no. ", "Order no "))
    return {words(sentence) for sentence in re.split(r"(?<=[.!?])\s+", text)}


def test_files_are_what_the_script_writes(tmp_path: Path) -> None:
    script.write(tmp_path)
    for name in (script.TRAIN_FILE, script.HELDOUT_FILE):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), "run data/make_tickets.py"


def test_sizes(train: list[Row], held_out: list[Row]) -> None:
    assert len(train) >= 400
    assert len(held_out) == 120


def test_answers_are_compact_json_that_the_ticket_supports(train: list[Row], held_out: list[Row]) -> None:
    for row in train + held_out:
        answer = json.loads(row["output"])
        assert list(answer) == FIELDS
        assert row["output"] == json.dumps(answer, separators=(",", ":"))
        assert answer["topic"] in script.TOPICS
        assert answer["product"] is None or answer["product"] in row["input"]
        numbers = [int(number) for number in re.findall(r"\b\d{5}\b", row["input"])]
        assert numbers == ([] if answer["order"] is None else [answer["order"]])


def test_every_value_occurs(train: list[Row], held_out: list[Row]) -> None:
    for rows in (train, held_out):
        answers = [json.loads(row["output"]) for row in rows]
        assert {answer["topic"] for answer in answers} == set(script.TOPICS)
        for field in ("order", "product"):
            share = sum(answer[field] is None for answer in answers) / len(answers)
            assert 0.1 < share < 0.5, f"{field} is null in {share:.0%}"


def test_no_template_is_shared() -> None:
    train, held_out = script.sentences(0), script.sentences(1)
    for part in (train, held_out):
        assert len({words(sentence) for sentence in part}) == len(part), "a template is written twice"

    def blank(sentence: str) -> str:
        return words(re.sub(r"\{\w\}", "_", sentence))

    assert not {blank(s) for s in train} & {blank(s) for s in held_out}


def test_no_sentence_is_shared_in_the_text(train: list[Row], held_out: list[Row]) -> None:
    seen = set().union(*(masked_sentences(row) for row in train))
    fresh = set().union(*(masked_sentences(row) for row in held_out))
    assert len(seen) > 100 and len(fresh) > 40
    assert not seen & fresh


def test_values_held_out_are_new(train: list[Row], held_out: list[Row]) -> None:
    def values(rows: list[Row], field: str) -> set[object]:
        return {json.loads(row["output"])[field] for row in rows} - {None}

    assert not values(train, "order") & values(held_out, "order")
    new = values(held_out, "product") - values(train, "product")
    assert len(new) >= 10
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    assert len({row["input"] for row in train}) == len(train)

"""Tables and marked tokens as text and as HTML."""

from __future__ import annotations

import pytest

from kit.answering.replies import Reply
from kit.common.show import TEXT_WIDTH, MarkedText, Table, duration, side_by_side, size


def test_a_table_is_wrapped_and_loses_nothing() -> None:
    path = "/a/long/path/without/a/space" * 8
    table = Table(["what", "n"], [["[b]two[/b]\nlines", 1234567], [path, True], ["北京", None]], "A <title>")
    lines = repr(table).splitlines()
    assert lines[0] == "A <title>" and lines[1].split() == ["what", "n"]
    assert max(map(len, lines)) <= TEXT_WIDTH and all(line == line.rstrip() for line in lines)
    assert "[b]two[/b]" in repr(table) and "1,234,567" in repr(table) and "True" in repr(table)
    assert path in "".join(line.split()[0] for line in lines if line.strip())
    page = table._repr_html_()
    assert "A &lt;title&gt;" in page and page.count("<tr>") == 4 and path in page


def test_a_table_without_rows_has_its_headings() -> None:
    assert repr(Table(["a", "b"], [])).split()[:2] == ["a", "b"]


def test_a_part_says_of_how_many() -> None:
    part = Table(["a"], [[1], [2], [3]], "answers", of=6)
    assert repr(part).splitlines()[0] == "answers: 3 of 6 rows" and "3 of 6 rows" in part._repr_html_()
    assert repr(Table(["a"], [[1]], of=6)).splitlines()[0] == "1 of 6 rows"
    assert "of" not in repr(Table(["a"], [[1], [2]], of=2))
    asked, replies = [[{"role": "user", "content": str(n)}] for n in range(6)], [Reply("yes", True)] * 5
    shown = side_by_side(asked, ["no"] * 6, before=replies, after=replies[:4])
    assert len(shown.rows) == 3 and shown.title == "3 of 4 rows", "all stages answered four"


def test_kinds_of_text_are_told_apart_without_colours() -> None:
    text = MarkedText("title", [("masked", "ask "), ("special", "<s>"), ("trained", "an"), ("trained", "swer"),
                                ("stop", "</s>"), ("lost", "cut")])
    assert repr(text).splitlines()[-1] == "ask <s>⟦answer</s>⟧⟪cut⟫"
    assert "lost" in repr(text).splitlines()[0]
    assert "&lt;s&gt;" in text._repr_html_() and "<s>" not in text._repr_html_()


def test_a_token_that_a_model_makes_up_is_not_shown() -> None:
    token = "hf_" + "Ab3dE5gH" * 5
    table = side_by_side([[{"role": "user", "content": "Log in?"}]], ["No."], after=[Reply(f"With {token}!", True)])
    assert table.rows == [["Log in?", "With [Hugging Face token]!", "No."]]


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (41.23, "41.2 s"), (270, "4.5 min"), (8280, "2.3 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(5, "5 B"), (144_810_848, "145 MB"), (1.2e9, "1.20 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text

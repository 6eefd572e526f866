"""The page of `kit lint --html`: what a row holds stays text, and the filters show just the right rows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kit.data.lint_report import Report

HOSTILE = ("</script><script>alert(1)</script> <img src=x onerror=alert(2)> <!--<script> &lt;b&gt; "
           "\u2028\u2029 \x00 \ud800 \u202e 🦥 中文")
TEMPLATE = Path(__file__).resolve().parents[2] / "kit" / "data" / "lint_page.html"
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", "--dump-dom"]


def row(number: int, text: str = "Hello", findings: tuple[str, ...] = (), split: str = "train",
        spans: list[list[str]] | None = None) -> dict[str, Any]:
    spans = spans if spans is not None else [
        ["special", "<|im_start|>"], ["masked", f"user\n{text}"], ["special", "<|im_end|>"],
        ["trained", f"Answer {number}"], ["stop", "<|im_end|>"]]
    return {"file": "a.jsonl", "row": number, "line": number, "split": split, "findings": list(findings),
            "details": [f"{code}: see here" for code in findings], "tokens": 12, "trained": 4, "lost": 0,
            "spans": spans}


def report(rows: list[dict[str, Any]], **severities: str) -> dict[str, Any]:
    places = {code: [{"file": r["file"], "row": r["row"], "line": r["line"], "detail": "here"}
                     for r in rows if code in r["findings"]] for code in severities}
    findings = [{"code": code, "severity": severity, "count": len(places[code]), "message": f"about {code}",
                 "remedy": "mend it", "places": places[code]} for code, severity in severities.items()]
    count = {s: sum(f["count"] for f in findings if f["severity"] == s) for s in ("error", "warning")}
    return {"title": "a.jsonl", "files": [{"name": "a.jsonl", "rows": len(rows), "shape": "messages", "turns": "1"}],
            "tokenizer": "tiny", "prompt_style": "chat", "max_seq_length": 64, "rows": len(rows),
            "usable_rows": len(rows), "errors": count["error"], "warnings": count["warning"],
            "lengths": {"p50": 12, "p95": 40, "p99": 60, "max": 80, "mean": 13.5,
                        "keep": {"95": 40, "99": 60, "100": 80},
                        "histogram": [{"from": 0, "to": 63, "rows": len(rows)}, {"from": 64, "to": 127, "rows": 1}]},
            "trained_share": 0.41, "tokens_per_epoch": 1200, "trained_tokens_per_epoch": 400, "steps_per_epoch": 3,
            "findings": findings}


def page(figures: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    return Report(figures, rows).page()


def embedded(document: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_hostile_row_stays_data() -> None:
    rows = [row(1, HOSTILE, ("</script>",))]
    document = page({**report(rows), "title": HOSTILE}, rows)
    assert embedded(document)["rows"] == rows
    assert embedded(document)["report"]["title"] == HOSTILE
    assert document.count("</script>") == TEMPLATE.read_text(encoding="utf-8").count("</script>") == 2
    assert document.count("<script") == 2
    assert not re.search("<img|onerror=alert\\(2\\)>|[\u2028\u2029\x00]", document)
    document.encode("utf-8")


def test_a_number_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        page({"trained_share": float("nan")}, [])


def test_the_page_asks_the_network_for_nothing() -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    asks = r"https?://|@import|url\(|\bsrc=|<iframe|fetch\(|XMLHttpRequest|WebSocket|sendBeacon"
    assert not re.search(asks, template)
    assert re.findall(r'href="([^"]*)"', template) == ["data:,"]
    document = page(report([]), [])
    assert "default-src 'none'" in document
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", document)


def test_the_script_builds_the_page_from_text_only() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser",
                         TEMPLATE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mixed() -> list[dict[str, Any]]:
    """60 rows: every 10th empty (an error), every 15th a duplicate (a warning), every 4th held out."""
    rows = []
    for number in range(1, 61):
        codes = [*(["empty_response"] if number % 10 == 0 else []), *(["duplicate"] if number % 15 == 0 else [])]
        text = {7: "A Lost PARCEL, (really?)", 8: HOSTILE, 9: "包裹在哪里"}.get(number, "Hello")
        rows.append(row(number, text, tuple(codes), "held-out" if number % 4 == 0 else "train"))
    return rows


class View:
    """The document as a browser shows it."""

    def __init__(self, folder: Path, document: str, fragment: str = "") -> None:
        file = folder / "page.html"
        file.write_text(document, encoding="utf-8")
        profile = folder / "profile"
        done = subprocess.run([str(BROWSER), *FLAGS, f"--user-data-dir={profile}", file.as_uri() + fragment],
                              capture_output=True, encoding="utf-8", errors="replace", timeout=120)
        shutil.rmtree(profile, ignore_errors=True)
        self.dom = done.stdout
        self.complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Content Security" in line]
        self.shown = int(re.findall(r'id="rows" data-shown="(\d+)"', self.dom)[0])
        self.rows = [int(number) for number in re.findall(r'<article [^>]*data-row="(\d+)"', self.dom)]
        self.text = html.unescape(re.sub(r"<script.*?</script>|<[^>]*>", "", self.dom, flags=re.DOTALL))


in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize(("fragment", "numbers"), [
    ("#q=lost%20parcel%2C%20(", [7]),
    ("#q=%E5%8C%85%E8%A3%B9", [9]),
    ("#q=.*", []),
    ("#finding=duplicate", [15, 30, 45, 60]),
    ("#severity=error", [10, 20, 30, 40, 50, 60]),
    ("#severity=error&finding=duplicate&split=held-out", [60]),
    ("#split=held-out&only=1", [20, 40, 60]),
    ("#page=2", list(range(51, 61))),
    ("#page=99", list(range(51, 61))),
    ("#finding=no_such_finding", []),
])
def test_a_link_shows_just_the_right_rows(tmp_path: Path, mixed: list[dict[str, Any]], fragment: str,
                                          numbers: list[int]) -> None:
    view = View(tmp_path, page(report(mixed, empty_response="error", duplicate="warning"), mixed), fragment)
    assert 'data-ready="1"' in view.dom
    assert view.rows == numbers
    assert view.shown == (60 if "page" in fragment else len(numbers))
    assert f"Showing {len(numbers)} of {view.shown} matching row" in view.text
    assert view.complaints == []


@pytest.mark.slow
@in_browser
def test_hostile_text_is_shown_as_text(tmp_path: Path, mixed: list[dict[str, Any]]) -> None:
    hostile = {**report(mixed, empty_response="error"), "title": HOSTILE[:80], "tokenizer": "<b>x</b>"}
    view = View(tmp_path, page(hostile, mixed), "#q=%3C%2Fscript%3E&white=1")
    assert view.rows == [8]
    assert "</script><script>alert(1)</script> <img src=x onerror=alert(2)> <!--<script> &lt;b&gt;" in view.text
    assert "U+2028U+2029·U+0000 U+D800 U+202E" in view.text and "🦥 中文" in view.text
    assert view.dom.count("<mark>&lt;/script&gt;</mark>") == 2
    assert not re.search("<img|<b>x", view.dom)
    assert view.complaints == []


@pytest.mark.slow
@in_browser
def test_the_five_kinds_and_the_verdict_are_told_in_words(tmp_path: Path) -> None:
    spans = [["special", "<s>"], ["masked", "Hi "], ["trained", "Yes"], ["stop", "</s>"], ["lost", "gone"]]
    rows = [row(1, spans=spans, findings=("cut",)), row(2, spans=[]), row(3, spans=[["masked", "{broken"]])]
    view = View(tmp_path, page(report(rows, cut="error"), rows))
    for kind, text in spans:
        assert re.search(rf'<(span|del) class="{kind}" title="{kind}: [^"]+">{html.escape(text)}</', view.dom)
    assert "1 finding of severity error: " in view.text
    assert "could not be read or formatted" in view.text and "{broken" in view.text
    clean = View(tmp_path, page(report([]), []))
    assert "Clean: nothing was found." in clean.text and "There are no rows." in clean.text
    assert view.complaints == clean.complaints == []


@pytest.mark.slow
@in_browser
def test_a_long_row_folds_around_its_answer_and_the_first_hit(tmp_path: Path) -> None:
    spans = [["masked", "a " * 2000 + "needle" + " b" * 2000], ["trained", "the answer"], ["stop", "</s>"]]
    rows = [row(1, spans=spans)]
    view = View(tmp_path, page(report(rows), rows), "#q=NEEDLE")
    assert "<mark>needle</mark>" in view.dom and "the answer" in view.text
    assert view.text.count("characters folded: show all") == 2
    shown = sum(len(html.unescape(text)) for text in re.findall(r'class="masked" title="[^"]*">(.*?)</span>', view.dom))
    assert 1200 < shown < 1700
    assert view.complaints == []


@pytest.mark.slow
@in_browser
def test_thousands_of_rows_come_in_pages(tmp_path: Path) -> None:
    rows = [row(number, "Where is my parcel? " * 20) for number in range(1, 3001)]
    view = View(tmp_path, page(report(rows), rows), "#q=PARCEL&page=3")
    assert view.shown == 3000
    assert view.rows == list(range(101, 151))
    assert "Showing 50 of 3,000 matching rows, page 3 of 60" in view.text
    assert view.complaints == []

"""The run's page: its verdict is never better than the files say, and what they hold stays text."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kit.recipe.recipe import Recipe
from kit.runs.report import interval, ollama_name, write_report
from kit.runs.run import Run

HOSTILE = "</td></style><script>alert(1)</script><img src=x onerror=alert(2)> \"' &lt;b&gt; {{ 7 * 7 }} 🦥 中文"
BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=4000", "--dump-dom"]
VOID = {"meta", "link", "img"}
# One white pixel.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mP8/x8AAwMCAO+ip1sAAAAASUVORK5CYII=")


class Page(HTMLParser):
    """The document's tags and attributes, the text below each element with an id, and the cells of its table's rows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[tuple[str, str]] = []
        self.text = ""
        self.below: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(self.source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id") or ""))
        if tag == "tr":
            self.rows.setdefault(self._section(), []).append([])
        elif tag in ("th", "td"):
            self.rows[self._section()][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if any(tag == "style" for tag, _ in self.open):
            return
        self.text += data
        for _, name in self.open:
            if name:
                self.below[name] = self.below.get(name, "") + data
        if any(tag in ("th", "td") for tag, _ in self.open):
            row = self.rows[self._section()][-1]
            row[-1] = (row[-1] + " ".join(data.split())).strip() if not data.isspace() else row[-1]

    def _section(self) -> str:
        return next(name for tag, name in self.open if tag == "section")

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    @property
    def verdict(self) -> str:
        return " ".join(self.below["verdict"].split())


def gate(name: str, passed: bool | None = True, **more: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "figure": "1", "tolerance": "2", "detail": "", "hint": "", **more}


SEALED = {"gguf/tickets-q8_0.gguf": "0123456789ab" + "f" * 52}


def write(run: Run, name: str, value: Any) -> None:
    (run.folder / name).write_text(json.dumps(value), encoding="utf-8")


def change(run: Run, name: str, **values: Any) -> None:
    write(run, name, {**json.loads((run.folder / name).read_text()), **values})


def verified(run: Run, *gates: dict[str, Any], **more: Any) -> None:
    passed = all(g["passed"] is not False for g in gates)
    write(run, "verify.json", {"passed": passed, "verdict": "", "checked": "2026-11-21T08:12:30+0000", "seconds": 41.2,
                               "gates": gates, **{"artefacts": SEALED, **more}})


def places(shown: Page, *names: str) -> bool:
    """Whether these parts are there, in this order."""
    found = [shown.source.index(f'id="{name}"') for name in names]
    return found == sorted(found)


def page(run: Run) -> Page:
    path = write_report(run)
    assert path == run.folder / "report.html"
    return Page(path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run's folder with everything but the weights."""
    made = Run(tmp_path / "tickets")
    for folder in (made.adapter, made.merged, made.gguf, made.figures):
        folder.mkdir(parents=True)
    (made.folder / "recipe.yaml").write_text(
        Recipe.load({"run_name": "tickets", "learning_rate": 0.001, "gguf": ["f16", "q8_0"]}).dump(), encoding="utf-8")
    steps = [{"step": n, "seconds": 2.0 * n, "tokens": 400 * n, "loss": 3 - n / 10} for n in range(1, 21)]
    made.log.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    write(made, "result.json", {
        "status": "finished", "stage": "done", "pid": 1, "started": "2026-11-21T08:07:01+0000",
        "finished": "2026-11-21T08:11:34+0000", "seconds": {"load": 0.5, "train": 40.25, "gguf": 6.1},
        "answered": {"rows": 60, "before": 60, "after": 60, "q8_0": 60},
        "answers": [{"prompt": "Hi 你好?", "before": "no", "after": "yes", "reference": "yes"},
                    {"prompt": "Bye?", "before": "no", "after": "no", "reference": "yes"}],
        "parameters": 1000, "trainable_parameters": 35, "peak_memory_gb": 3.96,
        "score_before": {"exact": 0.1, "city": 0.25}, "score_after": {"exact": 0.9, "city": 0.75},
        "scores": {"before": {"exact": 0.1, "city": 0.25}, "after": {"exact": 0.9, "city": 0.75},
                   "q8_0": {"exact": 0.8}},
        "train": {"steps": 20, "train_seconds": 40.0, "tokens": 8000, "tokens_per_second": 200.0, "losses": []},
        "files": {"gguf/tickets-q8_0.gguf": 144_810_848, "adapter/adapter_config.json": 2}})
    write(made, "manifest.json", {
        "model_name": "starter", "data_sha256": {"rows.jsonl": "c" * 64}, "template_sha256": "d" * 64,
        "stop_token": "<|im_end|>", "pad_token": "<pad>", "versions": {"torch": "2.13.0"}, "seed": 3407,
        "machine": {"device": "cpu", "device_name": "AMD EPYC", "cores": 2, "memory_gb": 25.2, "environment": "local"},
        "settings": ["bfloat16: this CPU has it"], "random_state": 3408, "git": "e" * 40,
        "artefacts": SEALED})
    for path in (made.adapter / "adapter_config.json", made.merged / "config.json", made.gguf / "Modelfile",
                 made.gguf / "tickets-q8_0.gguf", made.folder / "data.html", made.folder / "notebook.ipynb"):
        path.write_text("{}", encoding="utf-8")
    for name in ("loss.png", "lengths.png", "scores.png"):
        (made.figures / name).write_bytes(PIXEL + name.encode())
    return made


def test_a_verified_run_says_so_and_shows_each_gate(run: Run) -> None:
    verified(run, gate("parity f16", figure="KL 0.0003", tolerance="≤ 0.02"), gate("speed", None, detail="only told"))
    shown = page(run)
    assert shown.verdict == ("VERIFIED: what is shipped is what was trained 1 gate passed; "
                             "checked 2026-11-21 08:12 +0000, in 41.2 s")
    assert shown.rows["gates"] == [["", "Gate", "Measured", "Allowed", "Remarks"],
                                   ["✓", "parity f16", "KL 0.0003", "≤ 0.02", ""],
                                   ["–", "speed", "1", "2", "only told"]]


def test_failed_gates_stand_on_top_with_cause_and_remedy(run: Run) -> None:
    verified(run, gate("token ids"), gate("speed", None), gate("stops", hint="not needed"),
             gate("parity q8_0", False, figure="KL 0.9", tolerance="≤ 0.02", detail="damaged tensors",
                  hint="export again"))
    shown = page(run)
    assert shown.verdict.startswith("FAILED: parity q8_0 (2 gates passed)")
    first, *others = shown.rows["gates"][1:]
    assert first == ["✗", "parity q8_0", "KL 0.9", "≤ 0.02", "damaged tensors→ export again"]
    assert [row[:2] for row in others] == [["✓", "token ids"], ["–", "speed"], ["✓", "stops"]]
    assert "VERIFIED" not in shown.text and "not needed" not in shown.text
    assert "not ready to be shipped" in shown.below["uses"]
    assert places(shown, "verdict", "gates", "result", "answers", "numbers")
    assert ("details", "open", "") in shown.attributes, "it opens by itself"


def test_a_run_that_went_well_begins_with_what_came_of_it(run: Run) -> None:
    verified(run, gate("parity"), gate("stops"))
    shown = page(run)
    assert places(shown, "verdict", "result", "answers", "uses", "gates", "numbers")
    assert ("details", "open", "") not in shown.attributes and "all 2 gates passed" in shown.below["gates"]
    result = " ".join(shown.below["result"].split())
    for text in ("90.0%", "10.0%", "of 60 held-out rows", "79.9% to 95.3%", "4.7% to 20.1%"):
        assert text in result, text
    assert shown.rows["answers"] == [["prompt", "before", "after", "reference"], ["Hi 你好?", "no", "yes", "yes"],
                                     ["Bye?", "no", "no", "yes"]]
    assert "2 of 60 rows" in shown.below["answers"]
    change(run, "result.json", scores={"before": {}, "after": {}}, score_before={}, score_after={}, answers=[])
    shown = page(run)
    assert "answers" not in shown.below and "rows" not in shown.below["result"] and "scores.png" not in shown.text


@pytest.mark.parametrize(("name", "taken"), [("try-2", "try-2"), ("客服-试验", "my-model"), ("客服.v2", "v2"),
                                             ("a b/c+d", "a-b-c-d")])
def test_a_name_that_ollama_takes(name: str, taken: str) -> None:
    assert ollama_name(name) == taken


@pytest.mark.parametrize(("right", "count", "low", "high"), [
    # R. G. Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998).
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0)])
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert interval(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("content", "why"), [
    (None, ""),
    ("{torn", "damaged"),
    ('{"passed": true}', "damaged"),
    ('{"passed": true, "gates": ["x"]}', "damaged"),
    ({"passed": True, "gates": []}, "no gate in it"),
    ({"passed": True, "gates": [gate("speed", None)]}, "no gate in it"),
    ({"passed": True, "gates": [gate("parity", False)]}, "contradicts itself"),
    ({"passed": False, "gates": [gate("parity")]}, "contradicts itself"),
    ({"passed": True, "checked": "2026-11-21T08:07:00+0000", "gates": [gate("parity")]}, "older than this run"),
    ({"passed": True, "checked": "2026-11-21T09:07:00+0800", "gates": [gate("parity")]}, "older than this run"),
    ({"passed": True, "gates": [gate("parity")], "artefacts": {"gguf/x.gguf": "0" * 64}}, "about other files"),
])
def test_without_gates_to_rely_on_nothing_is_verified(run: Run, content: Any, why: str) -> None:
    if content is not None:
        (run.folder / "verify.json").write_text(content if isinstance(content, str) else json.dumps(content))
    shown = page(run)
    assert shown.verdict.startswith(f"not verified: kit verify {run.folder}")
    assert why in shown.verdict
    assert "VERIFIED" not in shown.text and "gates" not in shown.rows


@pytest.mark.parametrize(("status", "headline"), [
    ("failed", "FAILED: the run ended at the stage train"),
    ("stopped", "STOPPED: the run ended at the stage train"),
])
def test_a_run_that_did_not_finish_tells_how_far_it_came(run: Run, status: str, headline: str) -> None:
    result = json.loads((run.folder / "result.json").read_text())
    for name in ("scores", "score_after", "train", "files"):
        del result[name]
    write(run, "result.json", {**result, "status": status, "stage": "train", "reason": "GateError: nan\n  → lower it"})
    with run.log.open("a") as log:
        log.write('{"step": 21, "lo')
    shown = page(run)
    assert shown.verdict == f"{headline} GateError: nan → lower it"
    assert "Not verified: the run did not finish." in shown.below["gates"]
    assert "8,000 tokens, 20 steps, 40.0 s" in shown.below["numbers"]
    assert "mean of the last 2, from 2.900 at first" in shown.below["numbers"] and "1.050" in shown.below["numbers"]
    assert shown.rows["scores"][1:] == [["whole answer", "10.0%"], ["city", "25.0%"]]
    assert "log.jsonl" in shown.below["files"] and "report.html" not in shown.below["files"]
    verified(run, gate("parity"))
    assert "VERIFIED" not in page(run).text
    assert "report.html" not in page(run).below["files"]


def test_a_killed_or_working_run_is_told_as_such(run: Run) -> None:
    change(run, "result.json", status="running", stage="train", pid=2**30)
    assert page(run).verdict == "STOPPED: the run ended at the stage train the process was killed"
    change(run, "result.json", pid=1)
    verified(run, gate("parity"))
    assert page(run).verdict.startswith("RUNNING: at the stage train")


@pytest.mark.parametrize("missing", [["result.json"], ["manifest.json"], ["log.jsonl"], ["recipe.yaml"], ["figures"],
                                     ["gguf"], ["merged", "gguf"], ["data.html"], ["notebook.ipynb"], "all"])
def test_missing_pieces_leave_a_page(run: Run, missing: Any) -> None:
    for path in run.folder.iterdir() if missing == "all" else map(run.folder.joinpath, missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shown = page(run)
    assert run.folder.name in shown.text and "Undefined" not in shown.text
    if missing == "all":
        assert shown.verdict == "NO RESULT: the folder holds no readable result.json"
        assert shown.tags.count("section") == 1 and "recipe.yaml is missing" in shown.text
    assert shown.values("a", "href") == [name for name in ("data.html", "notebook.ipynb")
                                         if (run.folder / name).is_file()]
    assert ("ollama create" in shown.text) == (run.gguf / "Modelfile").is_file()
    assert ("vllm serve" in shown.text) == (run.merged / "config.json").is_file()


def test_no_script_no_network_and_the_figures_are_inside(run: Run) -> None:
    shown = page(run)
    assert "script" not in shown.tags
    policy = next(value for value in shown.values("meta", "content") if "default-src" in value)
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert not re.search(r"https?://|@import|url\(|<iframe|javascript:|\son\w+=", shown.source)
    assert shown.values("link", "href") == ["data:,"]
    heads, codes = zip(*(source.split(",") for source in shown.values("img", "src")), strict=True)
    assert set(heads) == {"data:image/png;base64"}
    assert list(map(base64.b64decode, codes)) == [PIXEL + name for name in (b"loss.png", b"scores.png", b"lengths.png")]


@pytest.mark.parametrize("answered", [None, [], {}, {"after": "many"}, {"after": -1}, {"after": 0}, "60"])
@pytest.mark.parametrize("answers", [None, "x", [1], [[]], {"a": "b"}])
def test_figures_that_are_none_leave_a_page(run: Run, answered: Any, answers: Any) -> None:
    change(run, "result.json", answered=answered, answers=answers, scores={"before": {"exact": 7}, "after": {}})
    shown = page(run)
    assert "interval" not in shown.text and "answers" not in shown.below


def test_hostile_text_stays_text(run: Run) -> None:
    verified(run, gate("parity", False, detail="a", hint="b"))
    change(run, "result.json", answers=[{"prompt": "a", "after": "b"}])
    plain = page(run)
    verified(run, gate(HOSTILE, False, figure=HOSTILE, tolerance=HOSTILE, detail=HOSTILE, hint=HOSTILE),
             artefacts={HOSTILE: HOSTILE})
    change(run, "result.json", files={HOSTILE: 5}, seconds={HOSTILE: 1.0}, started=HOSTILE,
           scores={"after": {HOSTILE: 0.5, "exact": 0.5}, HOSTILE: {"exact": 1.0}},
           answers=[{"prompt": HOSTILE, HOSTILE: "x"}])
    change(run, "manifest.json", settings=[HOSTILE], versions={HOSTILE: HOSTILE}, data_sha256={HOSTILE: HOSTILE},
           artefacts={HOSTILE: HOSTILE}, stop_token=HOSTILE, git=HOSTILE)
    with (run.folder / "recipe.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write(f"? {json.dumps(HOSTILE, ensure_ascii=False)}\n: {json.dumps(HOSTILE, ensure_ascii=False)}\n")
    shown = page(run)
    assert set(shown.tags) == set(plain.tags) and shown.tags.count("img") == 3
    assert {pair[:2] for pair in shown.attributes} == {pair[:2] for pair in plain.attributes}
    for section, times in {"gates": 6, "answers": 2, "stages": 1, "files": 1, "scores": 2, "recipe": 2,
                           "manifest": 5}.items():
        assert shown.below[section].count(HOSTILE) == times, section
    change(run, "result.json", status="failed", reason=HOSTILE)
    assert page(run).below["verdict"].count(HOSTILE) == 1


def test_what_cannot_be_seen_or_written_is_named(run: Run) -> None:
    change(run, "result.json", status="failed", reason="a\x00b\u202ec\ud800d\x1b[0m")
    assert page(run).verdict.endswith("aU+0000bU+202EcU+D800dU+001B[0m")


SECRET = {
    "AWS key": "AKIA" + "QWERTZUI" * 2,
    "GitHub token": "ghp_" + "a1B2" * 9,
    "Hugging Face token": "hf_" + "a1B2" * 8,
    "API key": "sk-" + "a1B2" * 6,
    "Google key": "AIza" + "a1B2" * 8 + "a1B",
    "Slack token": "xoxb-" + "a1B2" * 6,
    "signed token": "eyJ" + "a" * 12 + ".eyJ" + "b" * 12 + "." + "c" * 12,
    "private key": "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEA" * 4,
}


@pytest.mark.parametrize("kind", SECRET)
def test_a_secret_is_replaced_by_its_kind(run: Run, kind: str) -> None:
    secret = SECRET[kind]
    text = f"see {secret}"
    verified(run, gate("parity", False, figure=text, detail=text, hint=text))
    change(run, "result.json", files={text: 5})
    change(run, "manifest.json", settings=[text], versions={"x": text})
    with (run.folder / "recipe.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write(f"token: {json.dumps(text)}\n")
    shown = page(run)
    for line in secret.splitlines():
        assert line not in html.unescape(shown.source)
    for section, times in {"gates": 3, "files": 1, "recipe": 1, "manifest": 2}.items():
        assert shown.below[section].count(f"see [{kind}]") == times, section


def test_an_address_and_a_picture_are_no_secret(run: Run) -> None:
    picture = base64.b64decode("+" + SECRET["AWS key"] + "+++")
    (run.figures / "loss.png").write_bytes(picture)
    change(run, "result.json", status="failed", reason="ask anna@kit-mail.org")
    shown = page(run)
    assert "ask anna@kit-mail.org" in shown.verdict
    assert base64.b64decode(shown.values("img", "src")[0].partition(",")[2]) == picture


def test_the_forecast_stands_beside_what_happened(run: Run) -> None:
    assert "forecast" not in page(run).below
    change(run, "result.json", forecast={"peak_memory_gb": 3.6, "disk_gb": 0.5, "steps": None, "train_seconds": 80.0,
                                         "parts": {"weights": 1}})
    assert page(run).rows["forecast"][1:] == [["memory at most", "3.60 GB", "3.96 GB", "–"],
                                              ["disk", "0.50 GB", "–", "–"],
                                              ["training time", "1.3 min", "40.0 s", "–"]]
    change(run, "result.json", forecast_score={"peak_memory_gb": 1.1, "disk_gb": 1.5, "train_seconds": 0.5})
    assert page(run).rows["forecast"][1:] == [["memory at most", "3.60 GB", "3.96 GB", "–"],
                                              ["disk", "0.50 GB", "0.75 GB", "1.50"],
                                              ["training time", "1.3 min", "40.0 s", "0.50"]]


def test_figures_recipe_files_and_manifest_are_told(run: Run) -> None:
    shown = page(run)
    for text in ("200", "8,000 tokens, 20 steps, 40.0 s", "3.96 GB",
                 "46.9 s", "3.5%", "35 of 1,000"):
        assert text in shown.below["numbers"], text
    assert shown.rows["scores"] == [["Share that is right, 60 rows", "before", "after", "q8_0"],
                                    ["whole answer", "10.0%", "90.0%", "80.0%"], ["city", "25.0%", "75.0%", "–"]]
    change(run, "result.json", answered={"rows": 200, "before": 60, "after": 60, "q8_0": 40})
    assert page(run).rows["scores"][0][0] == "Share that is right, first 40 of 200 rows"
    assert shown.rows["stages"] == [["load", "0.5", ""], ["train", "40.2", ""], ["gguf", "6.1", ""]]
    assert [row[:3] for row in shown.rows["recipe"][1:]] == [
        ["run_name", "tickets", "run"], ["learning_rate", "0.001", "0.0002"], ["gguf", "[f16, q8_0]", "[]"]]
    assert shown.rows["files"][1:] == [["gguf/tickets-q8_0.gguf", "145 MB", "0123456789ab"],
                                       ["adapter/adapter_config.json", "2 B", ""]]
    for text in ("AMD EPYC", "torch 2.13.0", "cccccccccccc", "<|im_end|>", "random_state 3408", "bfloat16: this CPU"):
        assert text in shown.below["manifest"], text
    assert f"cd {run.gguf} && ollama create tickets -f Modelfile" in shown.below["uses"]
    assert f'kit ask {run.folder} "your question"' in shown.below["uses"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_shows_it_without_complaint_and_without_sideways_scrolling(run: Run, tmp_path: Path) -> None:
    long = "word" * 60
    verified(run, gate("parity", False, figure=long, detail=HOSTILE, hint="export " + long), gate(HOSTILE))
    change(run, "result.json", files={f"gguf/{long}.gguf": 5}, seconds={"train": 4.0})
    change(run, "manifest.json", settings=[long], stop_token=HOSTILE)
    source = write_report(run).read_text(encoding="utf-8")
    # A window can't be made as narrow as a telephone, a frame can.
    frames = "".join(f'<iframe width="{width}" srcdoc="{html.escape(source)}"></iframe>' for width in (400, 1200))
    watcher = tmp_path / "watcher.html"
    watcher.write_text(f"<!DOCTYPE html><meta charset='utf-8'><body>{frames}<pre></pre><script>onload = () => "
                       "document.querySelector('pre').textContent = JSON.stringify(Array.from(frames, frame => ["
                       "frame.innerWidth, frame.document.documentElement.scrollWidth, "
                       "frame.document.querySelectorAll('tr.failed').length, frame.document.scripts.length, "
                       "frame.document.querySelector('#manifest').innerText]))</script>", encoding="utf-8")
    done = subprocess.run([str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path}/profile", watcher.as_uri()],
                          capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Content Security" in line] == []
    found = re.findall("<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    for width, (window, needed, failed, scripts, text) in zip((400, 1200), json.loads(html.unescape(found[-1])),
                                                              strict=True):
        assert (window, failed, scripts) == (width, 1, 0)
        assert needed <= width
        assert HOSTILE in text


@pytest.mark.slow
def test_a_real_run_has_a_whole_page(finished_run: Path) -> None:
    shown = Page(write_report(Run.open(finished_run)))
    assert shown.verdict.startswith("VERIFIED: what is shipped is what was trained")
    assert len(shown.rows["answers"]) == 6 and "of 8 held-out rows" in shown.below["result"]
    assert {"numbers", "scores", "uses", "pictures", "stages", "recipe", "files", "manifest"} <= set(shown.below)
    assert shown.tags.count("img") == 3
    assert "notebook.ipynb" in shown.values("a", "href")
    for name in ("gguf/Modelfile", "adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert name in shown.below["files"]

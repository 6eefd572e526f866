"""`kit lint`: exit codes, what goes where, and no traceback whatever it is given."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.command import PROJECT, kit

pytestmark = pytest.mark.slow

CLEAN = [{"instruction": f"Where is house {i}?", "output": f"House {i} is on the left."} for i in range(6)]
FAULTY = [*CLEAN[:3], {"instrution": "Where is house 3?", "output": "Near\x07."}, CLEAN[0]]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lint(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`kit lint …`, which ends with this exit code and shows no traceback."""
    done = kit("lint", *map(str, arguments), timeout=120)
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text[-3000:]
    assert done.returncode == code, text[-3000:]
    return done


def test_clean_data_exits_with_0(tmp_path: Path) -> None:
    done = lint(write(tmp_path / "rows.jsonl", CLEAN))
    assert "6 of 6 rows can be trained" in done.stdout
    assert done.stdout.count("tokens are trained (⟦ ⟧)") == 2 and "⟦House 0 is on the left.<|im_end|>⟧" in done.stdout
    assert "for your model: --recipe RECIPE" in done.stdout
    assert done.stderr == ""


def test_warnings_alone_exit_with_0(tmp_path: Path) -> None:
    done = lint(write(tmp_path / "rows.jsonl", [*CLEAN, CLEAN[0]]), "--rows", "0")
    assert "! warning duplicate" in done.stdout and "row 7: as row 1" in done.stdout
    assert "tokens are trained (" not in done.stdout


def test_rows_as_other_tools_have_them(tmp_path: Path) -> None:
    """Printed over several lines in a .jsonl, registered in a dataset_info.json, in a template of one's own."""
    (tmp_path / "行 rows.jsonl").write_text(json.dumps(CLEAN, indent=2), encoding="utf-8")
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"identity": {"file_name": "行 rows.jsonl"}}), encoding="utf-8")
    (tmp_path / "我的.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}:\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}", encoding="utf-8")
    done = lint(f"{info}#identity", f"chat_template={tmp_path / '我的.jinja'}", "--rows", "1")
    assert "6 of 6 rows can be trained" in done.stdout and "我的.jinja" in done.stdout
    assert "<|im_start|>assistant:\n⟦House 0 is on the left.<|im_end|>⟧" in done.stdout
    assert f"kit: dataset: {info} describes data sets: identity" in lint(info, code=2).stderr


def test_errors_exit_with_1_and_page_and_copy_are_written_all_the_same(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", FAULTY)
    before = rows.read_bytes()
    done = lint(rows, "--html", tmp_path / "page.html", "--fix", tmp_path / "out.jsonl", code=1)
    assert "✗ error misnamed_field" in done.stdout and "row 4" in done.stdout and "→" in done.stdout
    assert "1 kind of error" in done.stdout
    page, copy, *repairs = done.stderr.splitlines()
    assert (page, copy) == (f"page: {tmp_path}/page.html", f"repaired copy: {tmp_path}/out.jsonl")
    assert sorted(repairs) == [
        "  1 × control characters removed: row 4", "  1 × left out: duplicate: row 5",
        "  1 × renamed: instrution to instruction: row 4", "  4 × rows written"]
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert rows.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "page.html", "rows.jsonl"]
    assert "4 of 4 rows can be trained" in lint(tmp_path / "out.jsonl").stdout


def test_a_token_in_a_row_exits_with_1_and_is_nowhere_repeated(tmp_path: Path) -> None:
    token = "hf_" + "Ab3dE5gH" * 5
    rows = write(tmp_path / "rows.jsonl", [*CLEAN, {"instruction": "How do I log in?", "output": f"With {token}."}])
    done = lint(rows, "--html", tmp_path / "page.html", "--fix", tmp_path / "out.jsonl", code=1)
    assert "✗ error secret" in done.stdout and "row 7: Hugging Face token hf_A…" in done.stdout
    assert "--fix" in done.stdout and "left out: secret: row 7" in done.stderr
    for text in (done.stdout, done.stderr, *map(Path.read_text, (tmp_path / "page.html", tmp_path / "out.jsonl"))):
        assert token[4:] not in text
    assert "6 of 6 rows can be trained" in lint(tmp_path / "out.jsonl").stdout


def test_json_is_all_that_goes_to_standard_output(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", FAULTY)
    done = lint(rows, "max_seq_length=64", "per_device_train_batch_size=1", "--json", "--html", tmp_path / "page.html",
                code=1)
    figures = json.loads(done.stdout)
    assert [finding["code"] for finding in figures["findings"]] == ["misnamed_field", "duplicate"]
    assert (figures["rows"], figures["usable_rows"], figures["max_seq_length"]) == (5, 4, 64)
    assert figures["steps_per_epoch"] == 1
    assert done.stderr == f"page: {tmp_path}/page.html\n"


def test_a_recipe_brings_its_own_data() -> None:
    done = lint("--recipe", "recipes/quickstart.yaml", "max_seq_length=250", "--rows", "1")
    assert "500 of 500 rows can be trained" in done.stdout
    assert "max_seq_length  " in done.stdout and "250; " in done.stdout
    assert "for your model" not in done.stdout and done.stdout.count("tokens are trained") == 1


def test_fields_stand_on_top_of_a_recipe_and_of_its_data(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [*CLEAN, {"instruction": "Write much.", "output": "much " * 100}])
    done = lint(rows, "--recipe", "recipes/quickstart.yaml", "max_seq_length=100", "overlong_rows=error", "--json",
                code=1)
    figures = json.loads(done.stdout)
    assert figures["max_seq_length"] == 100 and figures["rows"] == 7
    assert [(found["code"], found["severity"]) for found in figures["findings"]] == [("too_long", "error")]


def test_a_folder_whose_name_is_like_a_field_is_data(tmp_path: Path) -> None:
    # Tables that are divided into partitions have such names.
    folder = tmp_path / "language=en"
    folder.mkdir()
    assert "6 of 6 rows" in lint(write(folder / "rows.jsonl", CLEAN), "--rows", "0").stdout


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that can't be checked."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "nothing").mkdir()
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 20)
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write(folder / "rows.jsonl", CLEAN)
    write(folder / "old.jsonl", CLEAN)
    return folder


REFUSED = {
    "no file": (["{}/no.jsonl"], "there is no"),
    "an empty file": (["{}/empty.jsonl"], "is empty"),
    "a folder without rows": (["{}/nothing"], "holds no file of rows"),
    "a binary file": (["{}/picture.jsonl"], "no text, but binary data"),
    "an unknown kind of file": (["{}/picture.png"], "unknown kind of file"),
    "nothing to check": ([], "nothing to check"),
    "a field for data": (["max_seq_length=64"], "is no data"),
    "no recipe": (["{}/rows.jsonl", "--recipe", "{}/no.yaml"], "there is no recipe"),
    "an unknown field": (["{}/rows.jsonl", "max_seq_lenght=64"], "did you mean 'max_seq_length'"),
    "a bad value": (["{}/rows.jsonl", "max_seq_length=few"], "max_seq_length: 'few'"),
    "a page in no folder": (["{}/rows.jsonl", "--html", "{}/no/page.html"], "there is no folder"),
    "a copy in no folder": (["{}/rows.jsonl", "--fix", "{}/no/out.jsonl"], "there is no folder"),
    "a copy over a file": (["{}/rows.jsonl", "--fix", "{}/old.jsonl"], "exists already"),
    "a copy of two sources": (["--recipe", "{}/two.yaml", "--fix", "{}/out.jsonl"], "one source"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_checked_exits_with_2_and_says_why(bad: Path, what: str) -> None:
    arguments, words = REFUSED[what]
    (bad / "two.yaml").write_text(f"dataset: [{bad}/rows.jsonl, {bad}/old.jsonl]\n")
    before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    done = lint(*(argument.format(bad) for argument in arguments), "--rows", "0", code=2)
    first, *others = done.stderr.strip().splitlines()
    assert first.startswith("kit: ") and words in first + "".join(others)
    assert "→" in others[-1]
    assert {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments", [["--fast"], ["--rows", "-1"], ["--rows", "few"], ["--html"]], ids=str)
def test_unknown_options_and_values_exit_with_2(bad: Path, arguments: list[str]) -> None:
    assert "Error" in lint(bad / "rows.jsonl", *arguments, code=2).stderr


def test_bad_input_with_json_leaves_standard_output_empty(bad: Path) -> None:
    assert lint(bad / "empty.jsonl", "--json", code=2).stdout == ""


def test_an_interrupt_ends_in_one_line_with_130(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(400_000):
            numbers = " ".join(map(str, range(i, i + 20)))
            file.write(f'{{"instruction": "Where is house {i}?", "output": "{numbers}"}}\n')
    # A test run in the background may ignore the signal, and a child inherits that.
    started = subprocess.Popen([sys.executable, "-m", "kit", "lint", str(path)], cwd=PROJECT, bufsize=0,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert started.stderr
    shown = b""
    while b"checking" not in shown:  # its first line comes after seconds of reading
        more = started.stderr.read(1000)
        assert more, shown
        shown += more
    started.send_signal(signal.SIGINT)
    out, rest = started.communicate(timeout=30)
    assert (started.returncode, out) == (130, b"")
    *progress, last = (shown + rest).decode().splitlines()
    assert last == "kit: interrupted" and all(line.startswith("checking") for line in progress), progress

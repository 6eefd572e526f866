"""The data check: every finding in its place, no false alarm, and figures that are those of the training."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from kit.common.errors import GateError, KitError
from kit.data.findings import FINDINGS, SHOWN
from kit.data.formatting import load_data
from kit.data.lint import lint
from kit.data.lint_report import SAMPLES, Report
from kit.data.splits import Kept
from kit.models.styles import CHATML
from kit.models.template import prepare_tokenizer, render
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import check_secrets
from kit.runs.run import Run
from support.crafted import workbook_parts, zipped

pytestmark = pytest.mark.slow

Row = dict[str, Any]


def talk(*contents: str, system: str | None = None) -> Row:
    """A row whose contents are the user's and the assistant's in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns}


def good(i: int) -> Row:
    return talk(f"Où est le numéro {i} ?", f"The house number {i} is on the left.")


def roles(i: int, *names: str) -> Row:
    return {"messages": [{"role": name, "content": f"{name} {i}.{k}"} for k, name in enumerate(names)]}


def numbers(i: int, count: int) -> str:
    """Text of its own for each i."""
    return " ".join(str(pow(i, k, 99991)) for k in range(1, count + 1))


def thinking(i: int) -> Row:
    return talk(f"Where is number {i}?", f"<think>\nA street {i}.\n</think>\n\nOn the left, {i}.")


def as_bytes(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode()


def jsonl(bad: Callable[[int], Any], at: Iterable[int] = (4, 6), rows: int = 7,
          good: Callable[[int], Any] = good) -> bytes:
    """Good rows with bad ones among them; a blank line behind row 2 keeps rows and lines apart."""
    lines = [as_bytes(bad(i) if i in at else good(i)) for i in range(1, rows + 1)]
    return b"\n".join([*lines[:2], b"", *lines[2:]]) + b"\n"


# Qwen3's manner: the last answer begins with an empty thought, earlier ones don't.
EMPTY_THOUGHT = "<think>\\n\\n</think>\\n\\n"
HISTORY = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
           f"{{% if message['role'] == 'assistant' and loop.last %}}{{{{ '{EMPTY_THOUGHT}' }}}}{{% endif %}}"
           "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
           f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n{EMPTY_THOUGHT}' }}}}{{% endif %}}")
NO_EARLIER_THOUGHT = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML


def with_template(template: str) -> Callable[[Any], Any]:
    def made(tokenizer: Any) -> Any:
        tokenizer.chat_template = template
        return tokenizer

    return made


def without_a_phrase(tokenizer: Any) -> Any:
    """Each character has its token, but this phrase is taken out before."""
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("[as above]", "")
    return tokenizer


def stop_is_a_word(tokenizer: Any) -> Any:
    """Its stop token is found behind a full stop, but not behind a letter."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<|end|>", single_word=True, normalized=False)])
    return with_template(CHATML.replace("<|im_end|>", "<|end|>"))(tokenizer)


def characters(_: Any) -> Any:
    """A tokenizer of Latin characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", *map(chr, [10, *range(32, 127), *range(0xA0, 0x180)])]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(known)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>",
                                   pad_token="<pad>")
    return with_template(CHATML)(made)


def pieces(_: Any) -> Any:
    """A tokenizer of SentencePiece's kind: a space and the H behind it are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "▁", "\n", *map(chr, [*range(33, 127), *range(0xA1, 0x180)]), "▁H"]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(known)}, [("▁", "H")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>",
                                   pad_token="<pad>")
    return with_template(CHATML.replace("assistant\n", "assistant ").replace("['role'] + '\n'", "['role'] + ' '"))(made)


TOKEN = "hf_" + "Ab3dE5gH" * 5  # made up


class Case(NamedTuple):
    """A file with one thing wrong, and where."""

    data: bytes
    severity: str = "error"
    places: tuple[tuple[int, int], ...] = ((4, 5), (6, 7))  # rows and lines
    fields: Mapping[str, Any] = MappingProxyType({})
    tokenizer: Callable[[Any], Any] = copy.copy
    name: str = "rows.jsonl"
    held_out: bytes = b""


TABLE = b'instruction,output\n"a cell\nof two lines",1\nb,2\nc,3\nd,4,5\ne,6\nf\ng,8\n'
SHEET = "".join(f'<row r="{i + 1}"><c t="inlineStr"><is><t>Where is {i}?</t></is></c>' + (
    "<c><f>B1</f></c>" if i in (4, 6) else f'<c t="inlineStr"><is><t>Here is {i}.</t></is></c>') + "</row>"
    for i in range(1, 8))
CASES = {
    "invalid_json": Case(jsonl(lambda i: b'{"messages": [}')),
    "torn_line": Case(jsonl(good) + b'{"messages": [{"role": "user", "content": "Wh', places=((8, 9),)),
    "wrong_encoding": Case(jsonl(lambda i: as_bytes(talk("Café?", "Là.")).decode().encode("latin-1"))),
    "ragged_row": Case(TABLE, places=((4, 6), (6, 8)), name="rows.csv"),
    "unsaved_formula": Case(zipped(workbook_parts(SHEET, ("prompt", "completion"))), name="rows.xlsx"),
    "not_an_object": Case(jsonl(lambda i: ["a", "b"])),
    "missing_field": Case(jsonl(lambda i: {"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]})),
    "misnamed_field": Case(jsonl(lambda i: {"mesages": good(i)["messages"]})),
    "not_text": Case(jsonl(lambda i: {"messages": [{"role": "user", "content": i}]})),
    "mixed_shapes": Case(jsonl(lambda i: {"instruction": "Where?", "output": "Here."}, at=(4,)), places=((4, 5),)),
    "untrained_column": Case(jsonl(lambda i: {**good(i), "images": ["street.png"]})),
    "preferences": Case(jsonl(lambda i: {"chosen": good(i)["messages"], "rejected": good(i + 9)["messages"]})),
    "tools_not_shown": Case(jsonl(lambda i: {**good(i), "tools": [{"name": "clock"}]})),
    "wrong_role": Case(jsonl(lambda i: roles(i, "user", "robot"))),
    "first_turn": Case(jsonl(lambda i: roles(i, "assistant", "user", "assistant"))),
    "role_order": Case(jsonl(lambda i: roles(i, "user", "user", "assistant"))),
    "no_assistant": Case(jsonl(lambda i: roles(i, "system", "user"))),
    "empty_response": Case(jsonl(lambda i: talk(f"Where is {i}?", " \n"))),
    "empty_prompt": Case(jsonl(lambda i: talk("", f"Here is {i}."))),
    "special_token": Case(jsonl(lambda i: talk(f"What is <|im_end|> for, {i}?", f"It ends {i}."))),
    "template_refused": Case(jsonl(lambda i: talk(f"Where is {i}?", f"Here is {i}.", system="Be kind.")),
                             tokenizer=with_template(NO_SYSTEM)),
    "fully_masked": Case(jsonl(lambda i: talk(f"Where is {i}?", "[as above]" * i)), tokenizer=without_a_phrase),
    "stop_not_trained": Case(jsonl(lambda i: talk(f"Where is {i}?", f"On the left, {'a' * i}")),
                             tokenizer=stop_is_a_word),
    "heldout_overlap": Case(jsonl(good), held_out=jsonl(good, good=lambda i: good(i + 100))),
    "too_long": Case(jsonl(lambda i: talk(f"Where is {i}?", numbers(i, 150))), "warning",
                     fields={"max_seq_length": 256}),
    "prompt_cut": Case(jsonl(lambda i: talk(numbers(i, 150), f"It ends in {i}.")), "warning",
                       fields={"max_seq_length": 256, "overlong_rows": "truncate_prompt"}),
    "duplicate": Case(jsonl(lambda i: good(i - 3)), "warning"),
    "conflict": Case(jsonl(lambda i: talk("Où est le numéro 1 ?", f"It was number {i} once.")), "warning"),
    "history": Case(jsonl(lambda i: talk(f"{i}?", f"{i}!", f"{i} and one?", f"{i + 1}!")), "warning",
                    tokenizer=with_template(HISTORY)),
    "thinking_dropped": Case(jsonl(lambda i: {"messages": thinking(i + 100)["messages"] + thinking(i)["messages"]},
                                   good=thinking), "warning", tokenizer=with_template(NO_EARLIER_THOUGHT)),
    "mixed_thinking": Case(jsonl(thinking), "warning"),
    "placeholder": Case(jsonl(lambda i: talk(f"Dear {{{{name}}}}, where is {i}?", f"Here is {i}.")), "warning"),
    "other_assistant": Case(jsonl(lambda i: talk(f"Where is {i}?", f"Here is {i}.", system="You are Qwen, created by "
                                                 "Alibaba Cloud.")), "warning"),
    "control_character": Case(jsonl(lambda i: talk(f"Where is \x07 {i}?", f"Here is {i}.")), "warning"),
    "mojibake": Case(jsonl(lambda i: talk(f"OÃ¹ est le cafÃ© {i} ?", f"Here is {i}.")), "warning"),
    "not_normalised": Case(jsonl(lambda i: talk(f"Un cafe\u0301 au {i} ?", f"Here is {i}.")), "warning"),
    "unknown_token": Case(jsonl(lambda i: talk(f"Where is 北 {i}?", f"Here is {i}.")), "warning",
                          tokenizer=characters),
    "lost_character": Case(jsonl(lambda i: talk(f"Where is \U00050000 {i}?", f"Here is {i}.")), "error"),
    "secret": Case(jsonl(lambda i: talk(f"How do I log in, {i}?", f"With {TOKEN}, {i} times."))),
    "personal_address": Case(jsonl(lambda i: talk(f"Who is {i}?", f"Write to jane.{i}@company.de today.")), "warning"),
    "near_duplicate": Case(jsonl(lambda i: talk(f"What is row {i}?", numbers(2, 200)), at=(2, 4)), "info", ((4, 5),)),
    "outlier": Case(jsonl(lambda i: talk(f"Where is {i}?", numbers(i, 200)), at=(4,), rows=24), "info", ((4, 5),)),
}


class Fixture(NamedTuple):
    recipe: Recipe
    tokenizer: Any
    file: Path  # in which the findings are

    def lint(self) -> Report:
        return lint(self.recipe, self.tokenizer)


def fixture(folder: Path, tokenizer: Any, case: Case) -> Fixture:
    file = folder / case.name
    file.write_bytes(case.data)
    fields = {"dataset": str(file), **case.fields}
    if case.held_out:
        file = folder / "held-out.jsonl"
        file.write_bytes(case.held_out)
        fields["eval_dataset"] = str(file)
    recipe = Recipe.load({}, **fields)
    return Fixture(recipe, prepare_tokenizer(case.tokenizer(copy.deepcopy(tokenizer)), recipe), file)


def finding_of(report: Report, code: str) -> Row | None:
    return next((finding for finding in report.figures["findings"] if finding["code"] == code), None)


def codes(report: Report) -> list[str]:
    return [finding["code"] for finding in report.figures["findings"]]


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_bytes(b"".join(as_bytes(row) + b"\n" for row in rows))
    return path


def checked(tokenizer: Any, path: Path | list[str] | dict[str, float], **fields: Any) -> Report:
    recipe = Recipe.load({}, dataset=str(path) if isinstance(path, Path) else path, **fields)
    return lint(recipe, tokenizer)


def test_every_finding_has_a_fixture() -> None:
    assert set(CASES) == set(FINDINGS)


@pytest.mark.parametrize("code", CASES)
def test_a_finding_is_found_in_its_place_and_nothing_else(tmp_path: Path, tokenizer: Any, code: str) -> None:
    case = CASES[code]
    made = fixture(tmp_path, tokenizer, case)
    report = made.lint()
    assert codes(report) == [code], report
    finding = finding_of(report, code)
    assert finding and (finding["severity"], finding["count"]) == (case.severity, len(case.places))
    assert [(place["row"], place["line"]) for place in finding["places"]] == list(case.places)
    assert {place["file"] for place in finding["places"]} == {str(made.file)}
    assert (report.errors, report.figures["warnings"]) == (case.severity == "error", case.severity == "warning")
    if code != "mixed_shapes":  # about a file, not a row
        shown = [(row["row"], row["line"]) for row in report.rows if code in row["findings"]]
        assert sorted(shown) == list(case.places)
    for row, line in case.places:
        assert f"row {row} (line {line})" in repr(report)


@pytest.mark.parametrize("code", CASES)
def test_loading_refuses_what_the_check_calls_an_error_and_nothing_else(tmp_path: Path, tokenizer: Any,
                                                                        code: str) -> None:
    made = fixture(tmp_path, tokenizer, CASES[code])
    if CASES[code].severity == "error":
        with pytest.raises(KitError):
            load_data(made.recipe, made.tokenizer)
    else:
        assert len(load_data(made.recipe, made.tokenizer)["train"]) == made.lint().figures["usable_rows"]


@pytest.mark.parametrize("code, fields, severity", [
    ("heldout_overlap", {"eval_overlap": "drop"}, "warning"), ("heldout_overlap", {"eval_overlap": "keep"}, "warning"),
    ("too_long", {"max_seq_length": 256, "overlong_rows": "error"}, "error"),
])
def test_the_recipe_decides_how_severe_it_is(tmp_path: Path, tokenizer: Any, code: str, fields: Row,
                                             severity: str) -> None:
    made = fixture(tmp_path, tokenizer, CASES[code]._replace(fields=fields))
    finding = finding_of(made.lint(), code)
    assert finding and (finding["severity"], finding["count"]) == (severity, 2)


def test_a_held_out_row_that_loading_refuses_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    case = Case(jsonl(good), fields={"max_seq_length": 256, "overlong_rows": "error"},
                held_out=jsonl(lambda i: talk(f"Where is {i}?", numbers(i, 150)), good=lambda i: good(i + 100)))
    made = fixture(tmp_path, tokenizer, case)
    with pytest.raises(KitError):
        load_data(made.recipe, made.tokenizer)
    assert codes(made.lint()) == ["too_long"]


def test_a_row_whose_answer_shares_a_token_with_its_prompt_is_named(tmp_path: Path, tokenizer: Any) -> None:
    case = Case(jsonl(lambda i: talk(f"where {i}?", f"Here is {i}."),
                      good=lambda i: talk(f"where {i}?", f"on the left, {i}.")), tokenizer=pieces)
    report = fixture(tmp_path, tokenizer, case).lint()
    [finding] = report.figures["findings"]
    assert finding["severity"] == "error"
    assert [(place["row"], place["line"]) for place in finding["places"]] == list(case.places)


CODE = '''```python
@dataclass(frozen=True)
class Point:
    x: float = 0.0  # mail: user@example.com

    @property
    def text(self) -> str:
        return f"{self.x:.2f}\\t{{}}"
```'''
CLEAN_ROWS = [
    talk("What is the capital of France?", "Paris."),
    talk("北京在哪里？", "北京在中国北方，是中国的首都。它有三千多年的历史。", system="请用中文回答。"),
    talk("日本の首都は？", "東京です。「江戸」とも呼ばれていました。"),
    talk("Write a point class.", CODE),
    talk("Make a table.", "| name | price |\n|:-----|------:|\n| tea  | 3.50 € |\n| café | 4,20 € |"),
    talk("Send me a smile", "Here you are: 🙂👍🏽👩‍👩‍👧🇫🇷 ❤️ ✨"),
    talk("Traduis : “Where is the hotel?”",
         "«\u202fOù est l’hôtel\u202f?\u202f» – c’est près d’ici, à côté du théâtre… Ça va\u00a0? Œuvre, naïf, Noël."),
    talk("Übersetze: “That’s nice of you.”", "„Das ist nett von Ihnen“, sagte Jürgen – größer, süßer, Öl, Äpfel, Maß."),
    talk("¿Dónde está?", "¡Aquí! Mañana será «otro» día.", "¿Y qué más?", "Nada más.", "Gracias", "De nada, señor."),
    talk("Solve $x^2 = 4$", "$x = \\pm 2$, because $\\sqrt{4} = 2 \\le 4$.\n\n1. first\n2. second"),
    talk("Привет! Как дела?", "Хорошо, спасибо."), talk("مرحبا", "أهلا وسهلا"),
]


def test_clean_rows_give_no_finding(tmp_path: Path, tokenizer: Any) -> None:
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", CLEAN_ROWS))
    assert codes(report) == []
    assert report.figures["usable_rows"] == report.figures["rows"] == len(CLEAN_ROWS)
    assert report.verdict == f"{len(CLEAN_ROWS)} of {len(CLEAN_ROWS)} rows can be trained"


def test_a_token_that_also_begins_every_text_is_not_unknown(tmp_path: Path, tokenizer: Any) -> None:
    # GPT-2's manner: one token begins a text and stands for what is unknown.
    begins = prepare_tokenizer(with_template("{{ '<|endoftext|>' }}" + CHATML)(copy.deepcopy(tokenizer)),
                               Recipe.load({}))
    begins.bos_token = begins.unk_token
    assert codes(checked(begins, write(tmp_path / "rows.jsonl", CLEAN_ROWS))) == []


def test_the_bundled_data_has_no_error_and_no_warning(tokenizer: Any) -> None:
    report = lint(Recipe.load("recipes/quickstart.yaml"), tokenizer)
    assert (report.errors, report.figures["warnings"]) == (0, 0)
    assert [file["rows"] for file in report.figures["files"]] == [500, 120]


def many(count: int, seed: int = 0) -> list[Row]:
    """Rows of all lengths, of one to three turns."""
    pick = random.Random(seed)
    return [talk(*(f"{seed}.{i}.{k} {numbers(pick.randrange(2, 999), pick.randrange(1, 60))}"
                   for k in range(2 * pick.randrange(1, 4)))) for i in range(count)]


def lengths_of(rows: list[Row], tokenizer: Any) -> list[int]:
    """Tokens of each row, counted without the kit's formatter."""
    texts = [render(tokenizer, row["messages"], Recipe.load({})) for row in rows]
    return sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def smallest(lengths: list[int], percent: int) -> int:
    """The smallest limit under which at least so many rows are whole."""
    return next(limit for limit in lengths if 100 * sum(n <= limit for n in lengths) >= percent * len(lengths))


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 120])
def test_lengths_are_those_counted_by_hand(tmp_path: Path, tokenizer: Any, count: int) -> None:
    rows = many(count)
    order = lengths_of(rows, tokenizer)
    found = checked(tokenizer, write(tmp_path / "rows.jsonl", rows)).figures["lengths"]
    assert [found[name] for name in ("p50", "p95", "p99", "max")] == [smallest(order, p) for p in (50, 95, 99, 100)]
    assert found["keep"] == {name: smallest(order, int(name)) for name in ("95", "99", "100")}
    assert found["mean"] == round(sum(order) / count, 1)
    bars = found["histogram"]
    assert sum(bar["rows"] for bar in bars) == count
    assert [bar["rows"] for bar in bars] == [sum(bar["from"] <= n <= bar["to"] for n in order) for bar in bars]
    assert all(one["to"] + 1 == other["from"] for one, other in pairwise(bars))


def test_a_histogram_covers_a_row_far_longer_than_the_rest(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*many(150), talk("Where?", numbers(5, 900))]
    found = checked(tokenizer, write(tmp_path / "rows.jsonl", rows), max_seq_length=8192).figures["lengths"]
    assert sum(bar["rows"] for bar in found["histogram"]) == 151
    assert found["histogram"][-1]["to"] == found["max"] and len(found["histogram"]) <= 26


def test_the_limits_it_names_keep_that_share_when_loaded(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", many(120))
    for percent, limit in checked(tokenizer, path).figures["lengths"]["keep"].items():
        kept = [len(load_data(Recipe.load({}, dataset=str(path), max_seq_length=n), tokenizer)["train"])
                for n in (limit, limit - 1)]
        assert kept[0] >= 1.2 * int(percent) > kept[1]


@pytest.mark.parametrize("fields", [
    {}, {"max_seq_length": 300}, {"max_seq_length": 300, "overlong_rows": "truncate_prompt"},
    {"last_response_only": True}, {"train_on_responses_only": False}, {"system_prompt": "Be brief."},
    {"prompt_style": "alpaca"}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 7},
    {"dataset": ["a.jsonl", "b.jsonl"]}, {"dataset": {"a.jsonl": 3, "b.jsonl": 1}},
    {"dataset": {"a.jsonl": 0.5, "b.jsonl": 1}}, {"test_size": 0.25}, {"max_train_samples": 17},
    {"max_train_samples": 17, "test_size": 0.25}, {"dataset": ["a.jsonl", "b.jsonl"], "max_train_samples": 70},
    {"dataset": {"a.jsonl": 0.5, "b.jsonl": 2}, "max_train_samples": 70},
    {"dataset": ["a.jsonl", "b.jsonl"], "max_train_samples": 9},
], ids=str)
def test_what_an_epoch_costs_is_what_loading_gives(tmp_path: Path, starter: Path, fields: Row,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", many(60, 1))
    write(tmp_path / "b.jsonl", many(41, 2))
    recipe = Recipe.load({"dataset": "a.jsonl", **fields})
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(starter), recipe)
    train = load_data(recipe, tokenizer)["train"]
    figures = lint(recipe, tokenizer).figures
    tokens = sum(len(row) for row in train["input_ids"])
    trained = sum(label != -100 for row in train["labels"] for label in row)
    assert (figures["tokens_per_epoch"], figures["trained_tokens_per_epoch"]) == (tokens, trained)
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    assert figures["steps_per_epoch"] == math.ceil(len(train) / batch)
    if recipe.max_seq_length > 300:
        assert figures["trained_share"] == round(trained / tokens, 4)


def test_a_mixture_is_checked_as_one(tmp_path: Path, tokenizer: Any) -> None:
    one = write(tmp_path / "one.jsonl", [good(1), good(2), good(3)])
    other = write(tmp_path / "other.jsonl", [{"instruction": "Where?", "output": "Here."},
                                             {"instruction": "Où est le numéro 2 ?",
                                              "output": "The house number 2 is on the left."}])
    report = checked(tokenizer, [str(one), str(other)])
    files = report.figures["files"]
    assert [(file["name"], file["rows"], file["shape"], file["turns"]) for file in files] == [
        (str(one), 3, "messages", "2"), (str(other), 2, "alpaca", "2")]
    assert max(file["max"] for file in files) == report.figures["lengths"]["max"]
    assert codes(report) == ["duplicate"] and "other.jsonl row 2" in repr(report)
    [place] = report.figures["findings"][0]["places"]
    assert (place["file"], place["row"]) == (str(other), 2)
    assert "one.jsonl" in place["detail"]  # two files have a row 2


@pytest.mark.parametrize("fields", [{}, {"test_size": 4, "max_eval_samples": 2}, {"dataset": {"a.jsonl": 1.5}}],
                         ids=str)
def test_only_rows_that_max_train_samples_keeps_are_looked_at(tmp_path: Path, tokenizer: Any, fields: Row,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad row: the check names it, and loading refuses it, where it is kept; elsewhere both pass over it."""
    monkeypatch.chdir(tmp_path)
    rows = [good(i) for i in range(20)]
    recipe = Recipe.load({"dataset": "a.jsonl", **fields}, max_train_samples=8)
    bad = [b"{", as_bytes({"prompt": 1}), as_bytes({**good(9), "images": ["a"]}),
           as_bytes(talk("What is <|im_end|>?", "y"))]
    seen = Counter[bool]()
    for number in range(20):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(
            bad[number % 4] if i == number else as_bytes(row) for i, row in enumerate(rows)))
        kept = Kept(recipe)
        used = {place.row for place in (*kept.train, *kept.held_out)} if kept.drawn else range(1, 9)
        assert len(used) == 8 + 2 * bool(recipe.test_size)
        report = lint(recipe, tokenizer)
        assert bool(report.errors) == (number + 1 in used) and report.figures["rows"] == len(used), report
        seen[number + 1 in used] += 1
        if number + 1 in used:
            with pytest.raises(KitError):
                load_data(recipe, tokenizer)
        else:
            assert not codes(report) and len(load_data(recipe, tokenizer)["train"]) == 8
    assert seen[True] and seen[False]


def test_held_out_rows_count_in_no_figure_of_the_training(tmp_path: Path, tokenizer: Any) -> None:
    path, held_out = write(tmp_path / "a.jsonl", many(20, 1)), write(tmp_path / "b.jsonl", many(30, 2))
    alone = checked(tokenizer, path).figures
    both = checked(tokenizer, path, eval_dataset=str(held_out)).figures
    assert {**both, "files": both["files"][:1]} == alone
    assert {"name": str(held_out), "rows": 30, "shape": "messages"}.items() <= both["files"][1].items()


def test_findings_are_counted_in_full_but_listed_and_shown_in_part(tmp_path: Path, tokenizer: Any) -> None:
    rows = [talk(f"Where is \x07 {i}?", f"Here is {i}.") if i % 2 else good(i) for i in range(1, 301)]
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", rows))
    finding = finding_of(report, "control_character")
    assert finding and finding["count"] == 150 and len(finding["places"]) == SHOWN == 100
    assert [place["row"] for place in finding["places"]] == list(range(1, 200, 2))
    assert len(report.rows) == 2 * SAMPLES
    assert "and 145 more" in repr(report)


def test_a_row_whose_finding_shows_late_is_looked_up_again(tmp_path: Path, tokenizer: Any) -> None:
    rows = [good(i) for i in range(1, 301)]
    rows[200], rows[250] = (talk(f"What is row {i}?", numbers(7, 200)) for i in (201, 251))
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", rows))
    late = {row["row"]: row["findings"] for row in report.rows if row["findings"]}
    assert late == {201: ["outlier"], 251: ["near_duplicate", "outlier"]}
    [shown] = [row for row in report.rows if row["row"] == 251]
    assert "".join(text for _, text in shown["spans"]) == render(tokenizer, rows[250]["messages"], Recipe.load({}))
    [detail] = [d for code, d in zip(shown["findings"], shown["details"], strict=True) if code == "near_duplicate"]
    assert detail.endswith("as row 201")


def test_spans_are_of_the_right_kind(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", [talk("Hi", "Hello", "Bye", "Good night", system="Be kind.")])
    start, end = ("special", "<|im_start|>"), ("special", "<|im_end|>")
    line, stop = ("masked", "\n"), ("stop", "<|im_end|>")
    prompt = [start, ("masked", "system\nBe kind."), end, line, start, ("masked", "user\nHi"), end, line, start,
              ("masked", "assistant\n")]
    second = [line, start, ("masked", "user\nBye"), end, line, start, ("masked", "assistant\n")]
    [row] = checked(tokenizer, path).rows
    assert row["spans"] == [*prompt, ("trained", "Hello"), stop, *second, ("trained", "Good night"), stop, line]
    assert (row["trained"], row["lost"]) == (1 + 1 + 2 + 1, 0)
    # The limit takes " night", the stop token and the line break.
    [cut] = checked(tokenizer, path, max_seq_length=row["tokens"] - 3).rows
    assert cut["spans"] == [*prompt, ("trained", "Hello"), stop, *second, ("trained", "Good"),
                            ("lost", " night<|im_end|>\n")]
    assert (cut["tokens"], cut["lost"]) == (row["tokens"], 3)
    [all_trained] = checked(tokenizer, path, train_on_responses_only=False).rows
    assert {kind for kind, _ in all_trained["spans"]} == {"trained", "stop"}


ODD_ROWS = [*CLEAN_ROWS, talk("Send one", "🦥" * 20 + "龘" * 10), talk("Spaces , here .", "They 're  kept !\n\n Yes .")]


def joined(report: Report) -> list[str]:
    return ["".join(text for _, text in row["spans"]) for row in report.rows]


def test_spans_joined_are_the_rendered_text(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "rows.jsonl", ODD_ROWS)
    rendered = [render(tokenizer, row["messages"], Recipe.load({})) for row in ODD_ROWS]
    assert joined(checked(tokenizer, path)) == rendered


def test_a_limit_within_a_character_tears_no_text(tmp_path: Path, tokenizer: Any) -> None:
    # Rare characters take several tokens each.
    path = write(tmp_path / "rows.jsonl", ODD_ROWS)
    rendered = [render(tokenizer, row["messages"], Recipe.load({})) for row in ODD_ROWS]
    for limit in range(30, 46):
        assert joined(checked(tokenizer, path, max_seq_length=limit)) == rendered


class Tags(HTMLParser):
    """Open tags, and whether all were closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "link", "input", "br", "hr", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.open, tag
        while self.open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Report:
    """A report with errors, warnings and a row that can't be read."""
    rows = [good(1), b"{", talk("</script><b>\x07", "x & y"), good(1), {"messages": 3}]
    return checked(tokenizer, write(tmp_path_factory.mktemp("report") / "rows.jsonl", rows))


def test_the_figures_are_json(reported: Report) -> None:
    assert json.loads(json.dumps(reported.figures, allow_nan=False)) == reported.figures
    assert codes(reported) == ["invalid_json", "not_text", "duplicate", "control_character"]
    assert (reported.figures["rows"], reported.figures["usable_rows"]) == (5, 3)


def test_the_page_parses_and_holds_figures_and_rows(reported: Report, tmp_path: Path) -> None:
    reported.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Tags(text).open == []
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert embedded and json.loads(embedded[1])["report"] == reported.figures
    assert [row["row"] for row in json.loads(embedded[1])["rows"]] == [row["row"] for row in reported.rows]
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_text_and_notebook_tell_the_same(reported: Report) -> None:
    text, page = repr(reported), reported._repr_html_()
    for finding in reported.figures["findings"]:
        assert finding["message"] in text and finding["remedy"] in text and finding["code"] in page
    assert text.endswith("2 kinds of error: a run would stop at these rows")
    assert reported.verdict in page and Tags(page).open == []
    assert "<b>\x07" not in page
    assert [tokens.title.split(":")[0] for tokens in reported.examples(2)] == ["row 3", "row 4"]


def gate_of(report: Report, folder: Path) -> bool:
    """Whether the `secrets` gate of a finished run passes the page."""
    folder.mkdir()
    report.save(folder / "data.html")
    return check_secrets(Gates(""), Run(folder))


def test_what_the_check_passes_the_gate_of_the_finished_run_passes(tmp_path: Path, tokenizer: Any) -> None:
    rows = [talk(f"Where does hf_{'x' * 34} go?", f"Into HF_TOKEN:\nHF_TOKEN=hf_{'X' * 34}")]
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", rows))
    assert codes(report) == [] and "x" * 34 in report.page()
    assert gate_of(report, tmp_path / "run")


def test_a_secret_is_on_no_page_whether_its_row_can_be_formatted_or_not(tmp_path: Path, tokenizer: Any) -> None:
    rows = [talk(f"What is {TOKEN}?", "A token."), talk("令牌？", f"令牌是{TOKEN}。\n{TOKEN}"),
            talk("Say.", TOKEN, "More.", ""), {"text": TOKEN}, talk("Where is it?", "x " * 250 + TOKEN), good(1)]
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", rows), max_seq_length=256)
    found = finding_of(report, "secret")
    assert found and [place["row"] for place in found["places"]] == [1, 2, 5]
    assert {place["detail"] for place in found["places"]} == {"Hugging Face token hf_A…"}
    assert report.figures["usable_rows"] == 1
    assert TOKEN[4:] not in repr(report) + repr(report.examples(9)) + json.dumps(report.figures) + report.page()
    assert report.page().count("[Hugging Face token]") == 6
    assert gate_of(report, tmp_path / "run")


def test_a_secret_in_a_held_out_row_or_a_system_message_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    held = write(tmp_path / "held.jsonl", [talk("Where?", "Here.", system=f"Log in with {TOKEN}.")])
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", [good(1)]), eval_dataset=str(held))
    assert codes(report) == ["secret"] and report.errors == 1
    with pytest.raises(GateError, match=r"a token or key.*held\.jsonl row 1"):
        report.require()


def test_a_file_without_one_good_row_still_gives_a_report(tmp_path: Path, tokenizer: Any) -> None:
    report = checked(tokenizer, write(tmp_path / "rows.jsonl", [{"messages": []}, [1]]))
    assert codes(report) == ["not_an_object", "no_assistant"]
    assert report.figures["lengths"] == {} and report.figures["usable_rows"] == 0
    assert "row 1" in repr(report) and Tags(report.page()).open == []
    json.dumps(report.figures, allow_nan=False)


def test_a_source_that_cannot_be_read_raises(tmp_path: Path, tokenizer: Any) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(KitError, match="is empty"):
        checked(tokenizer, empty)
    with pytest.raises(KitError, match="there is no"):
        checked(tokenizer, tmp_path / "no.jsonl")

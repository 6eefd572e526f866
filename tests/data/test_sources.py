"""Where rows come from: files, folders, saved data sets, hubs; and what is said when one of them can't be read."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.common.files import PROJECT
from kit.data.rows import good_rows, rows_of
from kit.data.sources import STARTER_HELDOUT, STARTER_TRAIN, data_files, files_of, meant
from kit.data.splits import read_splits
from kit.recipe.recipe import Recipe

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "source": "x"}
CARD = """---
configs:
- config_name: small
  data_files: small.jsonl
- config_name: large
  data_files:
  - split: train
    path: large-*.jsonl
  - split: validation
    path: checks.jsonl
---
# Cats
"""


def alpaca(answer: Any = "cat") -> dict[str, Any]:
    return {"instruction": f"Say {answer}", "output": answer}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def folder_of(folder: Path, *names: str) -> Path:
    """A folder whose files hold one row each, which answers with the file's name."""
    for name in names:
        write(folder / name, alpaca(name))
    return folder


def answers(source: str | Path, **fields: Any) -> list[str]:
    return [row.messages[-1]["content"] for row in good_rows(source, Recipe.load({}, **fields))]


def refusal(source: str | Path, **fields: Any) -> str:
    with pytest.raises(KitError) as caught:
        list(good_rows(source, Recipe.load({}, **fields)))
    assert caught.value.hint
    return str(caught.value)


# One file


def test_bad_rows_are_collected_up_to_twenty_with_row_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", alpaca())
    with path.open("a") as file:
        file.write("\n" + (json.dumps({"text": "x"}) + "\n") * 30)
    message = refusal(path)
    assert message.startswith(f"dataset: {path}: bad rows (30):\n  row 2 (line 3): no fields")
    assert message.count("no fields") == 20 and "… and 10 more" in message and "row 21 (line 22)" in message
    assert f"kit lint {path}" in message


def test_rows_that_are_no_json_stand_among_the_bad_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", alpaca(), alpaca(""))
    with path.open("a") as file:
        file.write('{"instruction": \n' + json.dumps(CHAT["messages"]) + "\n")
    message = refusal(path)
    assert "bad rows (3)" in message and "row 2: the answer is empty" in message
    assert "row 3: line 3, column" in message and "row 4: a list where an object is needed" in message


def test_all_faults_of_a_row_are_said_at_once(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "rows.jsonl", {"prompt": 1, "completion": 2}))
    assert "row 1: prompt is a int, not text; completion is a int, not text" in message


def test_a_file_that_mixes_shapes_is_refused_with_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", alpaca(), alpaca(), CHAT, alpaca(), {"question": "a", "answer": "b"})
    message = refusal(path)
    assert f"dataset: {path} mixes shapes: alpaca 3 (first: row 1), messages 1 (first: row 3), " \
        "question 1 (first: row 5)" in message


def test_files_of_a_folder_may_have_different_shapes(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", alpaca())
    write(tmp_path / "b.jsonl", CHAT)
    assert answers(tmp_path) == ["cat", "Hello"]


@pytest.mark.parametrize("content, words", [
    ("", "is empty"), ("\n\n", "is empty"), ("[]", "is empty"), ("{", "line 1, column"),
])
def test_files_without_a_good_row(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert words in refusal(path)


def test_every_row_has_its_place_and_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n\n".join(map(json.dumps, (alpaca(), {"text": 1}))) + "]")
    one, two = rows_of(path, Recipe.load({}))
    assert (one.place, one.raw, one.shape, one.faults) == ((str(path), 1, 2), alpaca(), "alpaca", [])
    assert (two.place, two.raw, two.shape, two.messages) == ((str(path), 2, 4), {"text": 1}, None, [])
    assert (str(one.place), str(two.place)) == ("row 1 (line 2)", "row 2 (line 4)")


def test_columns_of_the_recipe_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"问题": "你好", "答案": "cat"})
    assert answers(path, columns={"prompt": "问题", "completion": "答案"}) == ["cat"]


def test_the_bytes_of_all_files_are_counted(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jsonl", "b.jsonl")
    told: list[int] = []
    list(rows_of(tmp_path, Recipe.load({}), told.append))
    assert sum(told) == sum(path.stat().st_size for path in tmp_path.iterdir())


# Folders


def test_a_folder_of_several_kinds_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    from openpyxl import Workbook

    write(tmp_path / "deep" / "e.jsonl", alpaca("five"))
    (tmp_path / "a.csv").write_text("instruction,output\nSay,one\n")
    (tmp_path / "b.json").write_text(json.dumps([alpaca("two")]))
    (tmp_path / "c.tsv").write_text("question\tanswer\nSay\tthree\n")
    book = Workbook()
    for row in (["prompt", "completion"], ["Say", "four"]):
        book.active.append(row)
    book.save(tmp_path / "d.XLSX")
    assert answers(tmp_path) == ["one", "two", "three", "four", "five"]


def test_a_folder_of_text_files_is_read_and_beside_tables_they_are_notes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Say\tone\n")
    assert answers(tmp_path) == ["one"]
    write(tmp_path / "rows.jsonl", alpaca())
    assert answers(tmp_path) == ["cat"]


def test_what_is_no_data_in_a_folder_is_left_alone(tmp_path: Path) -> None:
    folder_of(tmp_path, "rows.jsonl", ".hidden.jsonl", ".git/x.jsonl", "deep/.cache/x.jsonl", "dataset_infos.json",
              "dataset_info.json", "README.txt", "readme.zh.txt", "LICENSE.txt", "license.json", "requirements.txt")
    for name in ("README.md", "LICENSE", "picture.png", "run.py"):
        (tmp_path / name).write_text("configs: no\n")
    assert answers(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("names", [[], ["README.txt"], [".x.jsonl"]])
def test_a_folder_with_no_rows_says_what_kinds_there_are(tmp_path: Path, names: list[str]) -> None:
    message = refusal(folder_of(tmp_path, *names))
    assert f"{tmp_path} holds no file of rows\n  → known kinds are .json, .jsonl" in message


def test_a_folder_may_lie_in_a_hidden_one(tmp_path: Path) -> None:
    folder_of(tmp_path / ".cache" / "cats", "rows.jsonl", ".x.jsonl")
    assert answers(tmp_path / ".cache" / "cats") == ["rows.jsonl"]


def test_a_folder_may_be_named_from_the_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "cats", "rows.jsonl")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert answers("../cats") == ["rows.jsonl"]


OF_SPLIT = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}


@pytest.mark.parametrize("split, names", [
    ("train", "train.json training/a.jsonl cats_train.json train-00001-of-00002.jsonl TRAIN.csv train2.jsonl"),
    ("validation", "validation.jsonl valid.jsonl val/a.jsonl dev.json cats-dev.jsonl cats.dev.jsonl"),
    ("test", "test.json testing.jsonl eval.jsonl evaluation/a.jsonl cats.test.jsonl"),
    ("train", "latest.jsonl developer.jsonl trained.jsonl values.jsonl contest.jsonl rows.jsonl"),  # no split's word
])  # fmt: skip
def test_a_files_name_says_its_split(tmp_path: Path, split: str, names: str) -> None:
    for number, name in enumerate(names.split()):
        folder = folder_of(tmp_path / str(number), name, *(OF_SPLIT[other] for other in OF_SPLIT if other != split))
        assert files_of(folder, Recipe.load({}, dataset_split=split)) == [folder / name]


def test_dataset_split_chooses_among_the_splits_of_a_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, "train.jsonl", "more.jsonl", "dev.jsonl", "test.jsonl")
    assert answers(tmp_path) == ["more.jsonl", "train.jsonl"]  # a file of no split is for training
    assert answers(tmp_path, dataset_split="validation") == ["dev.jsonl"]
    assert answers(tmp_path, dataset_split="test") == ["test.jsonl"]
    message = refusal(tmp_path, dataset_split="dev")
    assert "has no split 'dev'; there are: test, train, validation" in message and "dataset_split" in message


def test_a_folder_of_another_split_only_is_not_trained_on(tmp_path: Path) -> None:
    assert "no split 'train'; there are: test" in refusal(folder_of(tmp_path, "test.jsonl"))


def test_bad_rows_of_a_folder_name_their_file(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jsonl")
    write(tmp_path / "b.jsonl", alpaca(), alpaca(""))
    assert "b.jsonl row 2: the answer is empty" in refusal(tmp_path)


# Paths


@pytest.mark.parametrize("name", ["tikets.jsonl", "./tikets.jsonl", "tickets", "data/tickets-trian.jsonl",
                                  "/tmp/none/of/these.jsonl", "~/nowhere-at-all.csv", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert f"there is no {name}" in message and "a path is looked up from the folder you are in" in message


@pytest.mark.parametrize("name, near", [("tikets.jsonl", "tickets.jsonl"),
                                        ("data/tickets-trian.jsonl", "tickets-train.jsonl")])
def test_a_path_that_is_not_there_names_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                      near: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, "tickets.jsonl")
    assert f"did you mean {near!r}?" in refusal(name)
    assert "did you mean 'tickets.jsonl'?" in refusal(tmp_path / "tikets.jsonl")


def test_a_path_may_be_given_from_the_project_or_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path, "rows.jsonl")
    assert answers("~/rows.jsonl") == ["rows.jsonl"]
    assert answers("data/tickets-train.jsonl") == answers("starter")


def test_an_unknown_kind_of_file_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "rows.jsnl").write_text("{}")
    message = refusal(tmp_path / "rows.jsnl")
    assert "unknown kind of file .jsnl (did you mean '.jsonl'?)" in message and ".parquet" in message


# For the manifest


def test_the_manifest_gets_every_file_that_is_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "a/train.jsonl", "a/test.jsonl", "b.jsonl", "held.jsonl")
    a, b, held = str(tmp_path / "a"), str(tmp_path / "b.jsonl"), str(tmp_path / "held.jsonl")
    assert data_files(Recipe.load({}, dataset={a: 2, b: 0.5}, eval_dataset=held)) == [
        tmp_path / "a" / "train.jsonl", Path(b), Path(held)]
    assert data_files(Recipe.load({})) == [STARTER_TRAIN, STARTER_HELDOUT]
    assert data_files(Recipe.load({}, test_size=0.1)) == [STARTER_TRAIN]
    assert data_files(Recipe.load({}, dataset=["starter", b], eval_dataset=held)) == [
        STARTER_TRAIN, Path(b), Path(held)]
    assert data_files(Recipe.load({}, dataset=["nobody/nothing", b])) == [Path(b)]


# Data sets that the `datasets` library reads


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return datasets


@pytest.fixture
def saved(tmp_path: Path, datasets: Any) -> Path:
    """A DatasetDict on disk."""
    splits = {name: datasets.Dataset.from_list([alpaca(f"{name} {i}") for i in range(2)]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.slow
def test_a_folder_that_datasets_saved(saved: Path) -> None:
    assert answers(saved / "train") == ["train 0", "train 1"]
    assert answers(saved) == ["train 0", "train 1"]
    assert answers(saved, dataset_split="test") == ["test 0", "test 1"]
    assert files_of(saved, Recipe.load({})) is None


@pytest.mark.slow
def test_a_split_that_was_not_saved_is_refused_with_those_that_were(saved: Path) -> None:
    message = refusal(saved, dataset_split="validation").replace(str(saved), "")
    assert "validation" in message and "dataset_split" in message
    assert "train" in message and "test" in message


@pytest.mark.slow
def test_a_saved_folder_may_have_a_card(saved: Path) -> None:
    (saved / "README.md").write_text("# Cats\n")
    assert answers(saved) == ["train 0", "train 1"]


@pytest.mark.slow
def test_rows_of_a_saved_folder_are_named_too(tmp_path: Path, datasets: Any) -> None:
    talks = [CHAT["messages"], [{"role": "user", "content": None}, {"role": "assistant", "content": "b"}]]
    datasets.Dataset.from_list([{"messages": talk} for talk in talks]).save_to_disk(tmp_path / "saved")
    assert "row 2: content of turn 1 is a NoneType, not text" in refusal(tmp_path / "saved")


@pytest.fixture
def described(tmp_path: Path, datasets: Any) -> Path:
    """A clone of a hub's data set with two configurations."""
    folder = folder_of(tmp_path / "cats", "small.jsonl", "large-1.jsonl", "large-2.jsonl", "checks.jsonl")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.mark.slow
def test_a_folder_with_a_data_card_is_read_as_the_card_says(described: Path) -> None:
    assert answers(described, dataset_config="small") == ["small.jsonl"]
    assert answers(described, dataset_config="large") == ["large-1.jsonl", "large-2.jsonl"]
    assert answers(described, dataset_config="large", dataset_split="validation") == ["checks.jsonl"]


@pytest.mark.slow
def test_a_card_with_one_configuration_needs_no_choice(described: Path) -> None:
    (described / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: small.jsonl\n---\n")
    assert answers(described) == ["small.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("fields, words", [
    ({}, "small"), ({"dataset_config": "lerge"}, "large"),
    ({"dataset_config": "small", "dataset_split": "dev"}, "Unknown split"),
])  # fmt: skip
def test_a_wrong_configuration_or_split_is_refused_with_the_known_ones(described: Path, fields: dict[str, Any],
                                                                       words: str) -> None:
    message = refusal(described, **fields)
    assert words in message and "check dataset_config and dataset_split" in message


def test_a_card_that_describes_no_files_changes_nothing(tmp_path: Path) -> None:
    folder_of(tmp_path, "rows.jsonl")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nSee configs: none\n")
    assert answers(tmp_path) == ["rows.jsonl"]


# Hubs


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that has nothing: its address, and what it was asked for."""
    asked: list[str] = []

    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def asked_for(name: str, hub: str, tmp_path: Path, recipe: str = "", **environment: str) -> str:
    """What a fresh process says: the hub's settings are read when its library is imported."""
    code = "import sys; from kit.common.errors import KitError; from kit.recipe.recipe import Recipe\n" \
           "from kit.recipe.reading import parse_overrides\n" \
           "from kit.data.rows import good_rows\n" \
           "try: list(good_rows(sys.argv[1], Recipe.load({}, **parse_overrides(sys.argv[2:]))))\n" \
           "except KitError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code, name, *recipe.split()], cwd=PROJECT, capture_output=True,
                          text=True, timeout=120,
                          env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def helps(message: str) -> bool:
    return all(words in message for words in ("HF_ENDPOINT", "hub: modelscope", "local_files_only", "on this disk"))


@pytest.mark.slow
def test_a_hub_that_does_not_have_it_says_what_helps(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    message = asked_for("nobody/nothing", hub[0], tmp_path)
    assert message.startswith("dataset: nobody/nothing: ") and helps(message)
    assert any("nobody/nothing" in path for path in hub[1])  # HF_ENDPOINT was heeded


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/sentence-splitter"])
def test_offline_nothing_is_asked_for(tmp_path: Path, hub: tuple[str, list[str]], name: str) -> None:
    message = asked_for(name, hub[0], tmp_path, HF_HUB_OFFLINE="1")
    assert hub[1] == []
    assert message.startswith(f"dataset: {name}: ") and helps(message)


@pytest.mark.slow
def test_with_local_files_only_nothing_is_asked_for(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    message = asked_for("nobody/nothing", hub[0], tmp_path, "local_files_only=true")
    assert message.startswith("dataset: nobody/nothing: ") and helps(message)
    assert hub[1] == []


class Stand:
    """The package modelscope as far as it is used: it puts a data set's files into a folder (test_modelscope.py has
    the real one)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, str | None]] = []
        self.error: Exception | None = None

    def fetch(self, name: str, revision: str | None = None) -> str:
        self.calls.append((name, revision))
        if self.error:
            raise self.error
        return str(self.folder)


@pytest.fixture
def modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand(folder_of(tmp_path / "fetched", "train.jsonl", "test.jsonl"))
    module = types.ModuleType("modelscope")
    module.dataset_snapshot_download = stand.fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    return stand


def test_modelscope_is_asked_for_what_the_recipe_names(modelscope: Stand) -> None:
    assert answers("cats/talk", hub="modelscope") == ["train.jsonl"]
    assert answers("cats/talk", hub="modelscope", dataset_split="test", dataset_revision="v1") == ["test.jsonl"]
    assert modelscope.calls == [("cats/talk", None), ("cats/talk", "v1")]


@pytest.mark.slow
def test_a_data_set_of_modelscope_may_have_a_card(modelscope: Stand, datasets: Any) -> None:
    (modelscope.folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: test.jsonl\n"
        "- config_name: large\n  data_files: train.jsonl\n---\n")
    assert answers("cats/talk", hub="modelscope", dataset_config="small", dataset_revision="v1") == ["test.jsonl"]


def test_bad_rows_and_errors_of_modelscope_are_named(modelscope: Stand) -> None:
    write(modelscope.folder / "train.jsonl", alpaca(), alpaca(""))
    assert "dataset: cats/talk: bad rows (1):\n  row 2: the answer is empty" in refusal("cats/talk", hub="modelscope")
    modelscope.error = ConnectionError("no route to modelscope.cn\nmore")
    message = refusal("cats/talk", hub="modelscope")
    assert "dataset: cats/talk: ConnectionError: no route to modelscope.cn more\n" in message and helps(message)


def test_what_lies_on_this_disk_is_not_looked_for_on_modelscope(tmp_path: Path, modelscope: Stand) -> None:
    assert answers(folder_of(tmp_path / "here", "rows.jsonl"), hub="modelscope") == ["rows.jsonl"]
    assert answers("starter", hub="modelscope") == answers("starter")
    assert modelscope.calls == []


def test_modelscope_is_not_asked_with_local_files_only(modelscope: Stand) -> None:
    message = refusal("cats/talk", hub="modelscope", local_files_only=True)
    assert "ModelScope is not asked with local_files_only" in message and "name the folder" in message
    assert modelscope.calls == []


def test_without_its_package_modelscope_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    message = refusal("cats/talk", hub="modelscope")
    assert "hub: modelscope needs the package modelscope" in message and "pip install modelscope" in message


# Names in `columns`

def of_columns(path: Path, columns: dict[str, str]) -> list[list[tuple[str, str]]]:
    recipe = Recipe.load({}, dataset=str(path), columns=columns)
    return [[(fault.code, fault.message) for fault in row.faults] for row in rows_of(path, recipe)]


def test_a_misspelt_name_in_columns_is_told_with_the_nearest_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,reply,note\na,b,c\nd,e,f\n")
    [[(code, message)], again] = of_columns(path, {"prompt": "quesion", "completion": "reply"})
    assert code == "misnamed_field" and "quesion" in message and "'question'" in message and len(again) == 1
    [[(code, message)], _] = of_columns(path, {"prompt": "topic", "completion": "reply"})
    assert code == "missing_field" and "topic" in message and "note" in message
    [[*both], _] = of_columns(path, {"prompt": "qestion", "completion": "repl"})
    assert [code for code, _ in both] == ["misnamed_field"] * 2
    with pytest.raises(KitError, match=r"(?s)2.*quesion.*question"):
        read_splits(Recipe.load({}, dataset=str(path), columns={"prompt": "quesion", "completion": "reply"}))
    assert of_columns(path, {"prompt": "question", "completion": "reply"}) == [[], []]
    # What `columns` says for another file is not told of this one.
    [[(code, message)], _] = of_columns(path, {"prompt": "topic", "answer": "repy"})
    assert (code, "topic" in message) == ("misnamed_field", False)


def test_a_misspelt_name_of_a_field_that_rows_can_do_without(tmp_path: Path) -> None:
    """Without it they are whole, and would be trained without a word of it."""
    path, columns = tmp_path / "rows.jsonl", {"instruction": "ask", "output": "reply"}
    path.write_text('{"ask": "a", "reply": "b", "context": "c"}\n{"ask": "d", "reply": "e"}\n')
    with pytest.raises(KitError, match=r"(?s)input.*contxt.*context"):
        read_splits(Recipe.load({}, dataset=str(path), columns={**columns, "input": "contxt"}))
    for right in ("context", "system_prompt"):  # the other one may be another file's
        assert len(read_splits(Recipe.load({}, dataset=str(path), columns={**columns, "input": right}))[0]) == 2


# Copies of a hub's data set


def test_dataset_config_is_a_folder_of_that_name_in_a_copy(tmp_path: Path) -> None:
    copy = folder_of(tmp_path / "COIG 数据", "ruozhiba/a.jsonl", "xhs/b.jsonl", "logi_qa/c.jsonl")
    assert answers(copy, dataset_config="ruozhiba") == ["ruozhiba/a.jsonl"]
    assert answers(copy / "xhs", dataset_config="xhs") == ["xhs/b.jsonl"]  # only that folder was copied
    assert answers(copy / "xhs" / "b.jsonl", dataset_config="ruozhiba") == ["xhs/b.jsonl"]
    assert data_files(Recipe.load({}, dataset=str(copy), dataset_config="xhs")) == [copy / "xhs" / "b.jsonl"]
    message = refusal(copy, dataset_config="rouzhiba")
    assert "has no folder 'rouzhiba' for dataset_config (did you mean 'ruozhiba'?)" in message
    assert "there are: logi_qa, ruozhiba, xhs; or leave dataset_config out to read the whole folder" in message
    flat = folder_of(tmp_path / "flat", "a.jsonl")
    assert "\n  → leave dataset_config out" in refusal(flat, dataset_config="ruozhiba")


# dataset_info.json

CHATS = [{"对话": [{"谁": "客户", "话": f"问{i}"}, {"谁": "客服", "话": "答"}], "提示": "你是客服", "system": "no"}
         for i in range(5)]
CALLS = [{"conversations": [{"from": "human", "value": "time?"},
                            {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'},
                            {"from": "observation", "value": "12"}, {"from": "gpt", "value": "noon"}],
          "tools": '[{"name": "clock", "description": "", "parameters": {}}]'}]
INFO: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "with system": {"file_name": "identity.json", "columns": {
        "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}},
    "openai": {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
        "system_tag": "system"}},
    "客服": {"file_name": "客服.json", "formatting": "sharegpt", "columns": {"messages": "对话", "system": "提示"},
           "tags": {"role_tag": "谁", "content_tag": "话", "user_tag": "客户", "assistant_tag": "客服"}},
    "pairs": {"file_name": "pairs.json", "columns": {"prompt": "q", "response": "r"}, "num_samples": 4},
    "more": {"file_name": "pairs.json", "columns": {"prompt": "q", "response": "r"}, "num_samples": 15},
    "calls": {"file_name": "calls.json", "formatting": "sharegpt", "columns": {
        "messages": "conversations", "tools": "tools"}},
    "functions": {"file_name": "functions.json", "formatting": "openai", "columns": {
        "messages": "messages", "tools": "tools"}, "tags": {"function_tag": "ask", "observation_tag": "told"}},
    "folder": {"file_name": "parts"},
    "hub": {"hf_hub_url": "cats/huggingface", "ms_hub_url": "cats/modelscope", "subset": "small", "folder": "x",
            "split": "test"},
    "ms": {"ms_hub_url": "cats/modelscope"},
}


@pytest.fixture
def info(tmp_path: Path) -> Path:
    """A dataset_info.json with its files, in a folder with a space in its name."""
    folder = tmp_path / "LF 目录" / "data"
    files = {"identity.json": [{**alpaca(), "input": "now", "system": "S", "history": [["a", "b"]]}],
             "chat.jsonl": [CHAT], "客服.json": CHATS,
             "pairs.json": [{"q": str(i), "r": "x", "input": "no"} for i in range(6)],
             "calls.json": CALLS, "parts/a.json": [alpaca("a")], "parts/b.json": [alpaca("b")],
             "functions.json": [{"messages": [{"role": "user", "content": "time?"}, {
                 "role": "ask", "content": '{"name": "clock"}'}, {"role": "told", "content": "12"}, {
                     "role": "assistant", "content": "noon"}], "tools": CALLS[0]["tools"]}]}
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(rows, ensure_ascii=False, indent=2), "utf-8")
    (folder / "dataset_info.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(INFO, ensure_ascii=False).encode())
    return folder / "dataset_info.json"


def test_entries_are_read_with_their_files_columns_and_tags(info: Path) -> None:
    def first(name: str) -> list[tuple[str, str]]:
        row = next(rows_of(f"{info}#{name}", Recipe.load({}, columns={"prompt": "其他"}, dataset_config="x")))
        assert not row.faults and row.place.file == f"{info}#{name}"
        return [(m["role"], m["content"]) for m in row.messages]

    asked = ("user", "Say cat\n\n### Input:\nnow")
    assert first("identity") == [asked, ("assistant", "cat")]
    assert first("with system") == [("system", "S"), ("user", "a"), ("assistant", "b"), asked, ("assistant", "cat")]
    assert first("openai") == [("user", "Hi"), ("assistant", "Hello")]
    assert first("客服") == [("system", "你是客服"), ("user", "问0"), ("assistant", "答")]
    assert first("pairs") == [("user", "0"), ("assistant", "x")]
    for name in ("calls", "functions"):
        assert first(name) == [("user", "time?"), ("assistant", ""), ("tool", "12"), ("assistant", "noon")]
    assert answers(f"{info}#folder") == ["a", "b"]


def test_entries_stand_beside_each_other_and_num_samples_draws(info: Path) -> None:
    recipe = Recipe.load({}, dataset=f"{info}#客服, pairs,more", test_size=0)
    assert list(recipe.sources) == [f"{info}#{name}" for name in ("客服", "pairs", "more")]
    train, _ = read_splits(recipe)
    asked = [row.messages[-2]["content"] for row in train]
    assert len(asked) == 5 + 4 + 15 and len({*asked[5:9]}) == 4 and {*asked[9:]} == {*map(str, range(6))}
    assert data_files(recipe) == [info, info.parent / "客服.json", info.parent / "pairs.json"]
    twice = Recipe.load({}, dataset={f"{info}#identity,pairs": 2})
    assert twice.sources == {f"{info}#identity": 2, f"{info}#pairs": 2}
    assert len(read_splits(twice)[0]) == 2 + 8


def test_an_entry_of_a_hub_says_which_and_which_part(info: Path) -> None:
    for hub, place in (("huggingface", "cats/huggingface"), ("modelscope", "cats/modelscope")):
        told = meant(f"{info}#hub", Recipe.load({}, hub=hub))
        assert (told.place, told.recipe.hub, told.folder) == (place, hub, "x")
        assert (told.recipe.dataset_config, told.recipe.dataset_split) == ("small", "test")
    assert meant(f"{info}#ms", Recipe.load({})).recipe.hub == "modelscope"
    assert data_files(Recipe.load({}, dataset=f"{info}#hub")) == [info]


@pytest.mark.parametrize("entry, words", [
    ({"file_name": "x.json", "ranking": True}, "preference data"),
    ({"file_name": "x.json", "columns": {"prompt": "q", "response": "r", "kto_tag": "k"}}, "preference data"),
    ({"file_name": "x.json", "columns": {"prompt": "text"}}, "name no response: rows to pre-train on"),
    ({"file_name": "identitty.json"}, "did you mean 'identity.json'?"), ({"script_url": "belle"}, "by a script"),
    ({"file_name": "x.json", "formatting": "sharegtp"}, "did you mean 'sharegpt'?"), ({}, "where its rows lie"),
    ({"file_name": "x.json", "columns": ["q"]}, "columns are no object"), ("x.json", "the entry is no object"),
    ({"file_name": "x.json", "num_samples": "5"}, "num_samples is '5'"),
    ({"file_name": "x.json", "formatting": "sharegpt", "columns": {"messages": "m", "system": "s"},
      "tags": {"system_tag": "sys"}}, "called 's' as a column and 'sys' as a role")])
def test_entries_that_are_refused(info: Path, entry: Any, words: str) -> None:
    info.write_text(json.dumps({**INFO, "odd": entry}))
    assert words in refusal(f"{info}#odd")


def test_an_entry_is_named(info: Path, tmp_path: Path) -> None:
    assert f"{info} describes data sets: identity, with system, openai, 客服" in (message := refusal(info))
    assert f"name one: {info}#NAME" in message
    message = refusal(f"{info}#identiy")
    assert "has no entry 'identiy' (did you mean 'identity'?)\n  → there are: identity, " in message
    assert "did you mean 'dataset_info.json'?" in refusal(f"{info.parent}/dataset_inf.json#identity")
    for text, words in ((b'"a": {', "not JSON"), (b"[]", "is an object"), (b'{"\xff"', "not UTF-8"), (b"", "not JSON")):
        info.write_bytes(text)
        assert words in refusal(f"{info}#identity")
    hashed = write(tmp_path / "a.json#b.jsonl", alpaca())
    assert answers(hashed) == ["cat"]  # a file may have such a name

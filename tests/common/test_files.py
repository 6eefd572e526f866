"""Files and folders appear whole or not at all; what the system refuses is an error of the user's disk."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from kit.common import files
from kit.common.errors import DiskError, KitError
from kit.common.files import (
    disk_error,
    existing,
    hashes_of,
    read_json,
    sha256,
    unwritable,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)
from kit.common.padding import padded
from kit.common.weight_files import INDEX, read_weights_header, shard_names, weight_files

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_after_an_error_the_file_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old\n")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(KitError, match=r"a\.txt"):
        write_text(tmp_path / "missing" / "a.txt", "x")


def test_json_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    write_json(path, {"a": "北京", "b": Path("x")})
    assert read_json(path) == {"a": "北京", "b": "x"} and "北京" in path.read_text(encoding="utf-8")
    for text in ("[1]", "{torn", ""):
        path.write_text(text)
        assert read_json(path) == {}


def test_a_folder_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for text in ("first", "second"):
        with whole_folder(folder) as partial:
            (partial / text).write_text(text)
    assert os.listdir(tmp_path) == ["f"] and os.listdir(folder) == ["second"]
    with pytest.raises(RuntimeError), whole_folder(folder) as partial:
        (partial / "third").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["f"] and os.listdir(folder) == ["second"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "f", os.replace

    def refuses_the_new_one(source: Path, target: Path) -> None:
        if source.name == "f.partial":
            raise FULL
        rename(source, target)

    folder.mkdir()
    (folder / "old").touch()
    monkeypatch.setattr(files.os, "replace", refuses_the_new_one)
    with pytest.raises(KitError, match=r"f can't be written"), whole_folder(folder) as partial:
        (partial / "new").touch()
    assert os.listdir(tmp_path) == ["f"] and os.listdir(folder) == ["old"]


@pytest.mark.parametrize(("error", "also", "refused"), [
    (FULL, (), True),
    (ValueError("I/O error: No space left on device (os error 28)"), (), True),
    (ValueError("no such thing"), (), False),
    (RuntimeError("PytorchStreamWriter failed"), (), False),
    (RuntimeError("PytorchStreamWriter failed"), (RuntimeError,), True),
    (RuntimeError("CUDA out of memory"), (RuntimeError,), False),
    (KitError("its own (os error 28)", "its own remedy"), (), False),
])
def test_what_counts_as_a_refusal_of_the_system(error: Exception, also: Any, refused: bool) -> None:
    with pytest.raises(KitError if refused else type(error)) as caught, unwritable(Path("a"), "the remedy", also):
        raise error
    assert (caught.value is error) != refused
    if refused:
        assert (caught.value.hint, type(caught.value)) == ("the remedy", DiskError)


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EFBIG, 1), (errno.EIO, 1),
                                              (errno.ENOENT, 2), (errno.EACCES, 2), (errno.EROFS, 2)])
def test_a_full_disk_is_no_bad_input(number: int, code: int) -> None:
    with pytest.raises(KitError) as caught, unwritable(Path("a")):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code
    told = disk_error(OSError(number, os.strerror(number), "runs/b/log.jsonl"), "runs/b")
    assert ("runs/b/log.jsonl" in told.message) if code == 1 and told else told is None


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "config.json", "other.txt"):
        (tmp_path / name).write_text(name)
    assert list(hashes_of(tmp_path)) == ["a.safetensors", "b.safetensors", "config.json"]
    assert hashes_of(tmp_path, [tmp_path / "other.txt"]) == {"other.txt": sha256(tmp_path / "other.txt")}
    assert hashes_of(tmp_path, []) == {}
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == existing(tmp_path) == tmp_path.resolve()


def test_padding_on_either_side() -> None:
    rows = [[1, 2, 3], [4]]
    assert padded(rows, 9) == ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    assert padded(rows, 9, left=True) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])


def safetensors(path: Path, header: Any, data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_is_read_and_a_cut_or_strange_file_refused(tmp_path: Path) -> None:
    tensor = {"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    file = safetensors(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, **tensor}, bytes(12))
    start, tensors = read_weights_header(file)
    assert tensors == {"w": ((2, 3), "BF16", 0, 12)} and start + 12 == file.stat().st_size
    for damaged in (safetensors(file, tensor, bytes(11)), safetensors(file, {"w": 1}, b""),
                    safetensors(file, [], b""), tmp_path / "none.safetensors"):
        with pytest.raises(KitError, match=damaged.name):
            read_weights_header(damaged)
    for content in (b"", b"\xff" * 20):
        file.write_bytes(content)
        with pytest.raises(KitError, match=file.name):
            read_weights_header(file)


def test_shards_are_those_the_index_names(tmp_path: Path) -> None:
    assert shard_names(tmp_path) == ["model.safetensors"]
    (tmp_path / "b.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "b.safetensors"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "2", "y": "1", "z": "2"}}))
    assert shard_names(tmp_path) == ["1", "2"]
    with pytest.raises(KitError, match="1"):
        weight_files(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(KitError, match=INDEX):
        shard_names(tmp_path)

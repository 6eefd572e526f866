"""GGUF export of the real starter model, its checks, and what happens when the child or a file is sabotaged."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kit.common.errors import GateError, KitError
from kit.gguf.child import LlamaChild, last_trouble
from kit.gguf.convert import check_disk, export_gguf, merged_weights
from kit.gguf.formats import QUANTIZATIONS, check_gguf, check_quantizations, file_bytes, needed_bytes, read_header

QUESTION = [{"role": "user", "content": "What is 2 + 2? Answer with one number. 谢谢 🙂"}]


@pytest.fixture(scope="module")
def starter() -> Path:
    from kit.models.starter import starter_model

    return starter_model()


@pytest.fixture(scope="module")
def tokenizer(starter: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(starter)


@pytest.fixture(scope="module")
def exported(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    paths = export_gguf(starter, folder, ["q8_0", "bf16", "q4_k_m"], "starter")
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in paths)
    return dict(zip(["q8_0", "bf16", "q4_k_m"], paths, strict=True))


def test_unknown_quantization_lists_those_that_exist() -> None:
    check_quantizations(list(QUANTIZATIONS))
    with pytest.raises(KitError) as error:
        check_quantizations(["q8_0", "q4km"])
    assert "'q4km'" in str(error.value)
    assert "did you mean 'q4_k_m'" in str(error.value)
    assert all(name in error.value.hint for name in QUANTIZATIONS)


def test_disk_check_says_needed_and_free(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(KitError, match=r"1000000.00 GB needed, \d+\.\d\d GB free"):
        check_disk(tmp_path, 10**15)
    assert needed_bytes(10**9, []) == 0
    assert needed_bytes(10**9, ["q8_0"]) > 3 * 10**9  # its temporary 16-bit source counts
    assert needed_bytes(10**9, ["f16"]) < 2.1 * 10**9


def test_no_merged_model(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="no merged model"):
        export_gguf(tmp_path, tmp_path / "out", ["q8_0"], "m")
    assert not (tmp_path / "out").exists()


def test_last_trouble_prefers_the_cause() -> None:
    assert last_trouble("loading\nerror loading model: bad magic\nfailed to load model\nbye\n") == \
        "error loading model: bad magic"
    assert last_trouble("a\n\nb\n") == "b"
    assert last_trouble("") == ""


def test_foreign_and_empty_files(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    with pytest.raises(KitError, match="no GGUF at"):
        check_gguf(file)
    file.write_bytes(b"PK\x03\x04" + b"0" * 100)
    with pytest.raises(KitError, match="does not begin with 'GGUF'"):
        check_gguf(file)
    file.write_bytes(b"GGUF\x03")
    with pytest.raises(KitError, match="inside the header, in its beginning"):
        check_gguf(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(KitError, match="version 9"):
        check_gguf(file)


def test_a_child_outside_with_is_refused() -> None:
    with pytest.raises(KitError, match="with"):
        LlamaChild(Path("m.gguf")).metadata()


@pytest.mark.slow
def test_sizes_match_their_headers_and_the_disk_check(starter: Path, exported: dict[str, Path]) -> None:
    parameters, dtype = merged_weights(starter)
    assert (parameters, dtype) == (134515008, "BF16")
    for quant, path in exported.items():
        assert check_gguf(path) == path.stat().st_size
        assert path.stat().st_size <= file_bytes(parameters, quant)
    sizes = {quant: path.stat().st_size for quant, path in exported.items()}
    assert sizes["q4_k_m"] < sizes["q8_0"] < sizes["bf16"] / 1.8
    assert sum(sizes.values()) <= needed_bytes(parameters, list(sizes))


@pytest.mark.slow
def test_cut_files_say_how_much_is_missing(exported: dict[str, Path], tmp_path: Path) -> None:
    whole = exported["q8_0"].read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(KitError, match=f"{len(whole) - len(whole) // 2} of {len(whole)} bytes are missing"):
        check_gguf(file)
    file.write_bytes(whole[:1000])
    with pytest.raises(KitError, match="inside the header"):
        check_gguf(file)
    with pytest.raises(KitError, match="inside the header"), LlamaChild(file):
        pass


@pytest.mark.slow
def test_child_answers(exported: dict[str, Path], tokenizer) -> None:
    with LlamaChild(exported["q8_0"], n_ctx=256, seconds=60) as child:
        assert child.metadata()["tokenizer.chat_template"] == tokenizer.chat_template
        expected = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
        assert child.render(QUESTION) == expected
        ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert child.prompt_ids(QUESTION) == child.tokenize(expected) == ids
        pieces = list(child.stream(QUESTION, 40))
        assert (len(pieces) > 1, child.finish_reason) == (True, "stop")
        assert child.answer(QUESTION, 40) == ("".join(pieces), "stop")
        assert child.answer(QUESTION, 2)[1] == "length"
        for _ in child.stream(QUESTION, 40):  # a stream broken off does not spoil the next answer
            break
        assert child.answer(QUESTION, 40) == ("".join(pieces), "stop")
        with pytest.raises(KitError, match="no logits"):
            child.predictions(ids, [0])
        with pytest.raises(GateError, match="exceed context window of 256") as error:
            child.answer([{"role": "user", "content": "x " * 500}], 5)
        assert "n_ctx" in error.value.hint
        with pytest.raises(KitError, match="not running"):
            child.metadata()


@pytest.mark.slow
def test_logprobs_equal_the_model_they_come_from(starter: Path, exported: dict[str, Path], tokenizer) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = tokenizer.apply_chat_template(QUESTION, return_dict=True)["input_ids"]
    with LlamaChild(exported["bf16"], n_ctx=128, logits=True) as child:
        ours, again = (torch.from_numpy(child.predictions(ids, range(len(ids)))[0]) for _ in range(2))
        assert torch.equal(ours, again)
    model = AutoModelForCausalLM.from_pretrained(starter, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
    assert abs(divergence) < 1e-3


@pytest.mark.slow
def test_template_variables_reach_the_embedded_template(starter: Path, tokenizer, tmp_path: Path) -> None:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template += "{% if add_generation_prompt and enable_thinking is false %}{{ 'Sum: ' }}{% endif %}"
    merged = tmp_path / "merged"
    shutil.copytree(starter, merged)
    changed.save_pretrained(merged)
    [path] = export_gguf(merged, tmp_path, ["q8_0"], "m")
    with LlamaChild(path, n_ctx=256, template_kwargs={"enable_thinking": False}) as child:
        assert child.render(QUESTION).endswith("Sum: ")
        assert child.tokenize("Sum: ") == child.prompt_ids(QUESTION)[-len(child.tokenize("Sum: ")):]


def as_sentencepiece(path: Path) -> bytes:
    """The GGUF with its byte-level tokenizer declared a SentencePiece one, tensors moved to keep their alignment."""
    whole, header = path.read_bytes(), read_header(path)
    key = struct.pack("<Q", 20) + b"tokenizer.ggml.model" + struct.pack("<I", 8)
    at = whole.index(key + struct.pack("<Q", 4) + b"gpt2") + len(key)
    with_longer_name = whole[:at] + struct.pack("<Q", 5) + b"llama" + whole[at + 12:]
    end = header.end + 1
    return with_longer_name[:end] + b"\0" * (-end % 32) + whole[header.start:]


@pytest.mark.slow
def test_native_abort_is_an_error_with_its_cause(exported: dict[str, Path], tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "wrong.gguf"
    file.write_bytes(as_sentencepiece(exported["q8_0"]))
    check_gguf(file)
    died = r"llama.cpp died \(killed by SIGABRT\); llama.cpp said: what\(\): .*"
    with pytest.raises(GateError, match=died), LlamaChild(file) as child:
        child.tokenize("Hello")


@pytest.mark.slow
def test_killed_and_hanging_children(exported: dict[str, Path]) -> None:
    with LlamaChild(exported["q8_0"]) as child:
        os.kill(child._process.pid, signal.SIGKILL)
        with pytest.raises(GateError, match="killed by SIGKILL"):
            child.answer(QUESTION, 5)
    with LlamaChild(exported["q8_0"]) as child:
        pid = child._process.pid
        child.seconds = 1
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(GateError, match="no answer within 1 seconds"):
            child.answer(QUESTION, 5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_ctrl_c_ends_the_child(exported: dict[str, Path]) -> None:
    with pytest.raises(KeyboardInterrupt), LlamaChild(exported["q8_0"]) as child:
        pid = child._process.pid
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        for _ in child.stream(QUESTION, 5000, temperature=2.0, top_p=1.0, top_k=0, min_p=0.0, seed=1):
            pass
        time.sleep(5)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_failed_conversion_keeps_the_last_good_file(starter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(starter, merged)
    config = merged / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "NoSuchModel"))
    folder = tmp_path / "out"
    folder.mkdir()
    for quant in ("f16", "q8_0"):
        (folder / f"m-{quant}.gguf").write_bytes(b"the last good one")
    for quants in (["f16"], ["q8_0"]):
        with pytest.raises(GateError, match="NoSuchModel"):
            export_gguf(merged, folder, quants, "m")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        f"m-{quant}.gguf": b"the last good one" for quant in ("f16", "q8_0")}


@pytest.mark.slow
@pytest.mark.parametrize(("limit_mb", "made"), [(50, []), (280, ["m-f16.gguf"])])
def test_a_file_that_cannot_be_written_whole(starter: Path, tmp_path: Path, limit_mb: int, made: list[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails part-way, as on a full disk: at the converter, and at the quantiser."""
    if made:  # the f16 file fits; a "q8_0" as large as f32 does not
        monkeypatch.setitem(QUANTIZATIONS, "q8_0", QUANTIZATIONS["q8_0"]._replace(file_type=0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_mb * 10**6, before[1]))
    try:
        with pytest.raises(GateError) as error:
            export_gguf(starter, tmp_path, ["f16", "q8_0"], "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == made
    assert error.value.hint
    assert "failed" in error.value.message


@pytest.mark.slow
def test_interrupted_export_leaves_nothing(starter: Path, tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from kit.gguf.convert import export_gguf; "
            "export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), ['q8_0'], 'm')")
    process = subprocess.Popen([sys.executable, "-c", code, str(starter), str(tmp_path)],
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.glob("*.partial"))
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert os.listdir(tmp_path) == []

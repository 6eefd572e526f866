"""GGUF files made to do harm: one clear error, in seconds and with little memory. Chat templates the same."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.common.errors import GateError, KitError
from kit.gguf.child import LlamaChild, child_environment
from kit.gguf.convert import export_gguf
from kit.gguf.formats import MAX_HEADER, chat_templates, check_gguf, control_tokens, read_header
from kit.gguf.setup import converter_dir
from kit.gguf.templates import check_template, in_time
from kit.gguf.trial import MEMORY, NO_REAL_ONE, OVERTIME
from support import grammars
from support.command import kit
from support.crafted import CRAFTED_TEMPLATES
from support.sabotage import edit_gguf

HUGE = 2**40
ALIGNMENT, LIST, NUMBER, TEXT = "general.alignment", 9, 4, 8


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name.encode()) + struct.pack("<I", kind) + value


def tensor(shape: list[int], offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return text(b"t") + struct.pack(f"<I{len(shape)}QIQ", count, *shape, 0, offset)


def header(body: bytes, fields: int = 1, tensors: int = 0) -> bytes:
    """A file of this header alone, padded to the tensors."""
    whole = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + body
    return whole + bytes(-len(whole) % 32)


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def a_list(item: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + items


HEADERS = {
    "an alignment that is a text": (header(field(ALIGNMENT, TEXT, text(b"32"))), "'general.alignment' is a text"),
    "an alignment of 0": (header(field(ALIGNMENT, NUMBER, numbers(0))), "'general.alignment' is 0"),
    "a negative alignment": (header(field(ALIGNMENT, 5, struct.pack("<i", -8))), "'general.alignment' is -8"),
    "a fraction": (header(field(ALIGNMENT, 6, struct.pack("<f", 32))), "'general.alignment' is a fraction"),
    "no power of two": (header(field(ALIGNMENT, NUMBER, numbers(24))), "'general.alignment' is 24"),
    "a huge alignment": (header(field(ALIGNMENT, 10, struct.pack("<Q", 2**63))), "cut short"),
    "a truth value": (header(field(ALIGNMENT, 7, b"\1")), "'general.alignment' is a truth value"),
    "deep lists": (header(field("a", LIST, a_list(LIST, 1) * 5000)), "field 'a' is a list of items of type 9"),
    "empty lists": (header(field("a", LIST, a_list(LIST, HUGE, a_list(0, 0) * 9))), "'a' is a list of items of type 9"),
    "many bytes": (header(field("a", LIST, a_list(0, HUGE))), "inside the header, in the field 'a'"),
    "many texts": (header(field("a", LIST, a_list(TEXT, HUGE, bytes(800)))), "inside the header, in the field 'a'"),
    "more than can be counted": (header(field("a", LIST, a_list(0, 2**64 - 1))), "in the field 'a'"),
    "many fields": (header(b"", fields=HUGE), "its 1099511627776 fields are more than"),
    "many tensors": (header(b"", 0, 2**64 - 1), "tensors are more than"),
    "many dimensions": (header(tensor([], dimensions=2**31), 0, 1), "tensor 't' has 2147483648 dimensions"),
    "many real dimensions": (header(tensor([2**64 - 1] * 10**6), 0, 1), "tensor 't' has 1000000 dimensions"),
    "a huge shape": (header(tensor([2**63] * 4), 0, 1), "tensor 't' has the shape"),
    "a far offset": (header(tensor([1], 2**64 - 1), 0, 1), "cut short"),
    "no UTF-8": (header(field("a", TEXT, text(b"\xff\xff"))), "field 'a' is no UTF-8"),
    "a name that is no UTF-8": (header(text(b"\xff") + struct.pack("<IB", 0, 1)), "name of field 1 is no UTF-8"),
    "a field twice": (header(field("a", 0, b"\1") * 2, 2), "field 'a' is there twice"),
    "a tensor twice": (header(tensor([1]) * 2, 0, 2), "tensor 't' is there twice"),
    "a type that is none": (header(field("a", 13, b"")), "field 'a' is of type 13"),
    "tokens that are a number": (header(field("tokenizer.ggml.tokens", NUMBER, numbers(1))), "not a list of texts"),
    "merges of numbers": (header(field("tokenizer.ggml.merges", LIST, a_list(NUMBER, 1, numbers(1)))), "whole numbers"),
    "an EOS that is a text": (header(field("tokenizer.ggml.eos_token_id", TEXT, text(b"</s>"))), "eos_token_id"),
    "a template that is a number": (header(field("tokenizer.chat_template", NUMBER, numbers(1))), "not a text"),
    "an origin that is a list": (header(field("general.description", LIST, a_list(TEXT, 1, text(b"x")))), "not a text"),
}


@pytest.mark.parametrize(("file", "cause"), HEADERS.values(), ids=HEADERS)
def test_a_header_is_not_believed(tmp_path: Path, file: bytes, cause: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file)
    start = time.monotonic()
    with pytest.raises(KitError) as error:
        check_gguf(path)
    assert cause in error.value.message and str(path) in error.value.message and error.value.hint
    assert len(error.value.message) < 400 and time.monotonic() - start < 2


def test_a_long_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(field("a", LIST, a_list(TEXT, MAX_HEADER // 8))))
    os.truncate(path, 2 * MAX_HEADER)
    with pytest.raises(KitError, match="'a' reaches beyond the 50,000,000 bytes"):
        read_header(path)


def test_fields_that_the_kit_reads_may_be_empty_lists(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    merges = field("tokenizer.ggml.merges", LIST, a_list(TEXT, 0))
    path.write_bytes(header(merges + field(ALIGNMENT, NUMBER, numbers(64)), 2))
    assert read_header(path).fields == {"tokenizer.ggml.merges": [], ALIGNMENT: 64}


@pytest.mark.slow
@pytest.mark.parametrize("template", CRAFTED_TEMPLATES.values(), ids=CRAFTED_TEMPLATES)
def test_a_template_has_limits(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(KitError, match=r"the chat template (needs|takes|writes) ") as error:
        check_template(template)
    assert error.value.hint == NO_REAL_ONE and time.monotonic() - start < 30


@pytest.mark.parametrize("name", ["times", "doubling", "indent"])
def test_the_trial_takes_little_memory(name: str) -> None:
    measure = ("import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'kit.gguf.trial']); "
               "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", measure], input=CRAFTED_TEMPLATES[name].encode(), check=True,
                          stdout=subprocess.PIPE, env=child_environment())
    reason, peak = done.stdout.decode().splitlines()
    assert "512 MB" in reason and int(peak) * 1024 < MEMORY + 2**26


@pytest.mark.parametrize("template", [
    "{{ 1 // 0 }}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% for %}", "{{ no_such() }}", "\ud800",
    "{% generation %}{{ raise_exception('no') }}{% endgeneration %}", "{{ range(10**9) }}",
    "{{ messages | tojson(indent=1) }}",
])
def test_other_faults_are_left_to_the_rendering(template: str) -> None:
    check_template(template)


@pytest.mark.slow
def test_real_templates_pass() -> None:
    files = sorted((converter_dir() / "models" / "templates").glob("*.jinja"))
    assert len(files) > 50
    for file in files:
        check_template(file.read_text(encoding="utf-8"))


def test_a_rendering_here_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.gguf.templates.SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(KitError, match="for one conversation"), in_time():
        while time.monotonic() - start < 5:
            pass
    with in_time():
        pass
    time.sleep(0.3)  # no alarm is left


@pytest.mark.slow
def test_a_gguf_with_such_a_template(starter: Path, tmp_path: Path) -> None:
    """Its child ends before llama-cpp-python compiles the template, and where it is rendered for a conversation."""
    [path] = export_gguf(starter, tmp_path, ["q8_0"], "m")
    thirteen = [{"role": "user", "content": "10"}] * 13
    for crafted, cause in {"{{ 'x' * (10**10) }}": "needs more than 512 MB",
                           CRAFTED_TEMPLATES["a loop in a loop"]: "takes more than 5 seconds"}.items():
        later = crafted.replace("10**10", "10**messages[1].content | int")
        edit_gguf(path, **{"tokenizer.chat_template": f"{{% if messages | length == 13 %}}{later}{{% endif %}}"})
        with LlamaChild(path) as child, pytest.raises(GateError, match=cause):
            child.render(thirteen)
        edit_gguf(path, **{"tokenizer.chat_template": crafted})
        with pytest.raises(GateError, match=cause) as error, LlamaChild(path):
            pass
        assert error.value.hint == NO_REAL_ONE
    asked = kit("ask", str(path), "hi")
    assert (asked.returncode, asked.stdout) == (1, "")
    assert asked.stderr == f"kit: {path.name}: {OVERTIME}\n  → {NO_REAL_ONE}\n"


@pytest.mark.parametrize("count", [pytest.param(5_000, marks=pytest.mark.slow),
                                   pytest.param(45_000, marks=pytest.mark.long)])
def test_random_headers_are_read_or_refused(tmp_path: Path, count: int) -> None:
    def use(data: bytes) -> None:
        path.write_bytes(data)
        found = read_header(path)
        chat_templates(found)
        control_tokens(found)
        assert 0 < check_gguf(path) <= len(data)

    with grammars.in_memory(tmp_path) as folder:
        path = folder / "random.gguf"
        outcomes = grammars.attempts(count, grammars.gguf, use)
    assert min(outcomes["value"], outcomes["refused"]) > count / 10

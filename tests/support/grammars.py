"""Random inputs by grammar: nearly right ones, which get further into a reader than random bytes.

Each function makes one from a `random.Random`; `attempts` gives many of them to a reader.
"""

from __future__ import annotations

import os
import random
import re
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.recipe.fields import Fields
from support.crafted import workbook_parts, zipped

SECONDS = 5  # for one input
MEGABYTES = 400  # for all of them


class TooSlow(BaseException):
    """No Exception, so that no reader takes it for damage in the input."""


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"longer than {SECONDS} seconds")


@contextmanager
def in_memory(folder: Path) -> Iterator[Path]:
    """A folder in memory where there is one, else this: a disk would be written ten thousands of times."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else folder) as made:
        yield Path(made)


def peak_megabytes() -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()) if Path("/proc").is_dir() else None
    return int(found[1]) / 1024 if found else 0


def attempts(count: int, make: Callable[[random.Random], Any], use: Callable[[Any], object]) -> Counter[str]:
    """Use so many inputs: each must give a value or one KitError, in time and in little memory. Returns how many did.

    An input is made from its number alone, so that the one that is printed at a failure can be made again.
    """
    outcomes, memory_before = Counter[str](), peak_megabytes()
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        for number in range(count):
            value = make(random.Random(number))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                use(value)
                outcomes["value"] += 1
            except KitError as error:
                assert error.message.strip() and len(str(error)) < 20_000
                outcomes["refused"] += 1
            except BaseException:
                print(f"input {number}: {value!r:.5000}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    taken = peak_megabytes() - memory_before
    assert taken < MEGABYTES, f"{taken:.0f} MB"
    print(f"{count} inputs: {dict(outcomes)}, {taken:.0f} MB")
    return outcomes


WORDS = ["a", "", "x" * 300, "猫", "é", "👩\u200d👩", "\u200b", "\x00", "\x1b", "\ud800", "</row>", "{{", "}}", "%",
    "'", '"', "\\", "\n", "\t", "\r", ": ", "- ", "#", "&a", "*a", "<<", "hf_" + "Ab3dE5gH" * 5, "../..", "/etc", "~",
    "None", "NaN"]
NUMBERS = [0, 1, -1, 2, 7, 31, 32, 255, 256, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


# Recipes

SCALARS = ["1", "0", "-1", "0x1F", "0o17", "0b1", "1_000", "190:20:30", "1e5", "1.0e-4", "2e-4", ".5", ".inf",
    "-.inf", ".nan", "1e999", "9" * 5000, "-" * 30, "true", "no", "off", "yes", "on", "null", "~", "", "2024-01-02",
    "2024-13-45", "2024-01-02T25:61:61Z", "12:00", "=", "<<", "starter", "data/tickets-train.jsonl", "auto",
    "bfloat16", "q8_0", "[]", "{}", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x",
    "!!binary ====", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object/apply:os.system [ls]",
    "!!python/name:os", "!x y", "!<tag:x> y", "&a 1", "*a", "*nowhere", "@x", "`x", "%x", "|\n  text\n  more",
    ">-\n  text", "|9\n  x", '"\\u0041\\x41\\ud800"', '"\\q"', "'it''s'", '"open', "'open", "[1, 2", "{a: 1",
    "[[[[[[1]]]]]]", "? x", "- - - 1", "a: b: c", "\t1", "1 # why", "#", "\u2028", "\ufeff", "\u0085"]


def recipe(rng: random.Random) -> bytes:
    """A recipe file."""
    lines = [rng.choice(["", "%YAML 1.1\n---", "---", "# why", "\ufeff", "...", "- a"])] if rng.random() < 0.3 else []
    names = list(Fields.model_fields)
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6, 12))):
        name = rng.choice(names)
        if rng.random() < 0.15:
            name = rng.choice([name[:-1], name.upper(), name + " ", "token", "1", "~", "true", "? " + name, "<<",
                '"' + name + '"', "[a]", "{a: 1}", "&a " + name, "*a", "!!str " + name, *WORDS])
        lines.append(f"{name}: {_yaml(rng, 0)}")
    if rng.random() < 0.1:
        lines.append(rng.choice(["r: " + "[" * 3000, "r: " + "{a: " * 2000, "r: " + "- " * 2000, "a: &a [*a]",
            "---\nr: 1", "r: 1\nr: 2", "a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", "r: " + "a" * 100_000,
            "a" * 3000 + ": 1", "\0", "\t"]))
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        data = rng.choice([data + b"\xff", data.decode("utf-8", "replace").encode("utf-16"),
            data[: rng.randrange(len(data) + 1)]])
    return data


def _yaml(rng: random.Random, depth: int) -> str:
    match rng.randrange(8 if depth < 4 else 4):
        case 0 | 1:
            return rng.choice(SCALARS)
        case 2:
            return str(rng.choice([*NUMBERS, rng.uniform(-2, 2), rng.uniform(0, 1e6)]))
        case 3:
            return rng.choice(['"{}"', "'{}'", "{}"]).format(rng.choice(WORDS))
        case 4:
            return f"[{', '.join(_yaml(rng, depth + 1) for _ in range(rng.randrange(4)))}]"
        case 5:
            return (
                f"{{{', '.join(f'{_yaml(rng, depth + 1)}: {_yaml(rng, depth + 1)}' for _ in range(rng.randrange(3)))}}}"
            )
        case 6:
            return "\n" + "\n".join(f"{'  ' * (depth + 1)}- {_yaml(rng, depth + 2)}" for _ in range(rng.randrange(4)))
        case _:
            return "\n" + "\n".join(f"{'  ' * (depth + 1)}{rng.choice(WORDS[:6])}: {_yaml(rng, depth + 2)}"
                for _ in range(rng.randrange(3)))


# GGUF

FIELD_NAMES = ["general.architecture", "general.alignment", "general.name", "general.description",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
    "tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id", "tokenizer.chat_template",
    "tokenizer.chat_template.tool_use", "llama.block_count", ""]
UNSIGNED = [number for number in NUMBERS if number >= 0]
SCALAR_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def gguf(rng: random.Random) -> bytes:
    """A GGUF file with a small header, and as many bytes of tensors as it says or not."""
    fields, tensors = rng.choice((0, 1, 2, 5, 12)), rng.choice((0, 0, 1, 2, 5))
    body = b"".join(_gguf_text(rng, rng.choice([rng.choice(FIELD_NAMES), *[f"a{number}"] * 3])) + _gguf_value(rng, 0)
        for number in range(fields))
    for number in range(tensors):
        dimensions = rng.choice((0, 1, 2, 2, 3, 4, 5))
        shape = [rng.choice((1, 32, 256, *UNSIGNED[:8])) if rng.random() < 0.9 else rng.choice(UNSIGNED)
            for _ in range(dimensions)]
        body += _gguf_text(rng, f"blk.{number}.weight") + struct.pack(f"<I{dimensions}QIQ", dimensions, *shape,
            rng.choice((0, 1, 8, 12, 30, 99, 2**32 - 1)), rng.choice((0, 32, 1024, rng.choice(UNSIGNED))))
    count = [number if rng.random() < 0.98 else rng.choice(UNSIGNED) for number in (tensors, fields)]
    data = (rng.choice([b"GGUF"] * 30 + [b"GGML", b"", b"PK\3\4"]) + struct.pack("<IQQ", rng.choice([3] * 20 + [2, 1,
        4, 2**32 - 1]), *count) + body)
    data += bytes(-len(data) % 32) + rng.randbytes(rng.choice((0, 0, 100, 4096)))
    if rng.random() < 0.15:
        data = data[: rng.randrange(len(data) + 1)]
    if rng.random() < 0.2 and data:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    return data


def _gguf_text(rng: random.Random, text: str | None = None) -> bytes:
    data = (rng.choice(WORDS) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data) if rng.random() < 0.998 else rng.choice(UNSIGNED)) + data


def _gguf_value(rng: random.Random, depth: int) -> bytes:
    kind = rng.choice([*SCALAR_TYPES, 8, 8, 8, 9, 9, 9, *([13, 2**32 - 1] if rng.random() < 0.05 else [])])
    return struct.pack("<I", kind) + _gguf_payload(rng, kind, depth)


def _gguf_payload(rng: random.Random, kind: int, depth: int) -> bytes:
    if kind == 8:
        return _gguf_text(rng)
    if kind == 9:
        item, count = rng.choice([*SCALAR_TYPES, 8, 8, 9]), rng.choice((0, 1, 3, 40))
        said = count if rng.random() < 0.99 else rng.choice(UNSIGNED)
        items = b"".join(_gguf_payload(rng, item, depth + 1) for _ in range(count)) if depth < 3 else b""
        return struct.pack("<IQ", item, said) + items
    return rng.randbytes(struct.calcsize(SCALAR_TYPES[kind])) if kind in SCALAR_TYPES else b""


# Workbooks

ESCAPED = ["a", "", "猫", "&amp;&lt;", "&#233;", "&#0;", "&#xD800;", "&nbsp;", "_x000D_", "_x005F_x000D_",
    "<![CDATA[<x>]]>", "<!-- x -->", "<?x y?>", "1", "-1", "1e5", "1e999", "nan", "9" * 5000, "0", "99999999",
    "45000.5", "TRUE", "2024-01-02T03:04:05", "PT1H", "=A1", "#N/A", " x ", "<b/>", "<t>x</t>", "x" * 40_000]


def workbook(rng: random.Random) -> bytes:
    """An .xlsx whose parts are XML, or nearly."""
    parts = workbook_parts("".join(_row(rng, number) for number in range(2, 2 + rng.choice((0, 1, 3, 8)))))
    if rng.random() < 0.5:
        parts["xl/sharedStrings.xml"] = _xml("sst", "".join(f"<si>{_text(rng)}</si>"
            for _ in range(rng.randrange(5)))).encode()
    if rng.random() < 0.3:
        codes = ("0.00", "yyyy-mm-dd", "[h]:mm", "&quot;d&quot;0", "", ";;;")
        formats = "".join(f'<numFmt numFmtId="{rng.choice((14, 164, 165, "x"))}" formatCode="{rng.choice(codes)}"/>'
            for _ in range(rng.randrange(3)))
        styles = "".join(f'<xf numFmtId="{rng.choice((0, 14, 22, 46, 164, 165, 999, "x"))}"/>'
            for _ in range(rng.randrange(4)))
        parts["xl/styles.xml"] = _xml("styleSheet", f"<numFmts>{formats}</numFmts><cellStyleXfs>{styles}</cellStyleXfs>"
            f"<cellXfs>{styles}</cellXfs>").encode()
    for name in list(parts):
        if rng.random() < 0.04:
            parts[name] = _spoilt(rng, parts[name])
        if rng.random() < 0.01:
            del parts[name]
    data = zipped(parts)
    return _spoilt(rng, data) if rng.random() < 0.03 else data


def _spoilt(rng: random.Random, data: bytes) -> bytes:
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([data[:at], data[:at] + data[end:], data[:at] + data[at:end] * 2 + data[end:], data.upper(),
        data.decode("latin-1").encode("utf-16"), data.replace(b"sheet", b"x:sheet"), data.replace(b'Target="',
        b'Target="../'), b"", b"<!DOCTYPE x [<!ENTITY a 'b'>]>" + data, data.replace(b"</", b"<"),
        data[:at] + rng.randbytes(9) + data[at:], data.replace(b"r:id", b"id"), data.replace(b"<row", b"<x:row")])


def _xml(tag: str, inner: str) -> str:
    return f'<{tag} xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">{inner}</{tag}>'


def _text(rng: random.Random) -> str:
    ways = ("<t>{}</t>", '<t xml:space="preserve">{}</t>', "<r><rPr/><t>{}</t></r>", "<rPh><t>{}</t></rPh>", "{}")
    sound = [text for text in ESCAPED if text[:2] != "&#" and text != "&nbsp;"]
    return "".join(rng.choice(ways).format(rng.choice(sound if rng.random() < 0.98 else ESCAPED))
        for _ in range(rng.choice((0, 1, 1, 1, 3))))


def _row(rng: random.Random, number: int) -> str:
    places = ["", ' r="1"', ' r="0"', ' r="-3"', ' r="2.0"', ' r="2.5"', ' r="x"', ' r="1048577"', ' r="nan"']
    place = rng.choice(places) if rng.random() < 0.1 else f' r="{number}"'
    cells = "".join(_cell(rng, number, column) for column in range(rng.choice((0, 1, 2, 2, 2, 2, 3))))
    return f"<row{place}>{cells}</row>"


SOUND = {"n": ["1", "-2.5", "1e5", "45000.5"], "s": ["0"], "str": ["a", "&amp;", "猫", "_x000D_"], "b": ["0", "1"],
    "e": ["#N/A"], "d": ["2024-01-02T03:04:05", "2024-01-02"]}


def _cell(rng: random.Random, number: int, column: int) -> str:
    place, kind, style = f"{'ABC'[column]}{number}", rng.choice([*SOUND, "inlineStr"]), rng.choice(["", "", ' s="1"'])
    inner = f"<is>{_text(rng)}</is>" if kind == "inlineStr" else f"<v>{rng.choice(SOUND[kind])}</v>"
    if rng.random() < 0.1:
        inner = rng.choice(["", "<v/>", "<f>A1</f>", "<f>A1</f><v>2</v>", "<v>1</v><v>2</v>", "<c><v>1</v></c>"])
    if rng.random() < 0.05:
        inner = f"<v>{rng.choice(ESCAPED)}</v>"
    if rng.random() < 0.05:
        place = rng.choice(["", "A1", "XFD1", "XFE1", "ZZZZZ1", "1", "a1", "é1", "$A$1", "A"])
    if rng.random() < 0.05:
        kind, style = rng.choice(["", "x", *SOUND]), rng.choice(["", ' s="99"', ' s="x"', ' s=""'])
    marks = f' r="{place}"' * bool(place) + f' t="{kind}"' * bool(kind) + style
    return f"<c{marks}>{inner}</c>"


# Chat templates

EXPRESSIONS = ["message", "messages", "message['role']", "message.content", "message['content']",
    "messages[0]['role']", "messages[-1]", "loop.index0", "loop.last", "add_generation_prompt", "enable_thinking",
    "tools", "bos_token", "eos_token", "undefined_name", "none", "true", "1", "-1", "0", "'<|im_start|>'",
    "'<|im_end|>\\n'", "''", "'user'", "[]", "{}", "[1, 2]", "{'a': 1}", "range(3)", "namespace(x=1)", "1 // 0",
    "'a' * 3", "messages | length", "message | tojson", "message.content | trim", "message.content | upper",
    "message.content.split('</think>')[-1]", "raise_exception('no')", "strftime_now('%Y')", "message.__class__",
    "''.__class__.__mro__", "messages | map(attribute='role') | join", "message.tool_calls", "cycler('a')",
    "dict(a=1)", "lipsum(n=1)", "self", "caller()", "f(1)", "ns.x", "x"]
FILTERS = ["length", "tojson", "trim", "default(1)", "join", "list", "string", "int", "first", "last", "sort", "nope",
    "indent(2)", "replace(1, 2)", "selectattr(1)", "items", "safe"]
TESTS = ["defined", "none", "string", "mapping", "iterable", "nope", "sameas 1", "divisibleby 0"]
OPERATORS = ["+", "~", "==", "!=", "in", "and", "or", "*", "%", "<", "-", "is", "**", "//", "|", "."]


def template(rng: random.Random) -> str:
    """A Jinja template as models have them, or nearly."""
    quiet = ["", "{# note #}", "{% set x = 1 %}", "{% if loop.first %}{% endif %}", "{% if message.x %}y{% endif %}"]
    if rng.random() < 0.7:
        body = rng.choice(quiet) if rng.random() < 0.5 else _template(rng, 1)
        end = _template(rng, 2) if rng.random() < 0.3 else ""
        turn = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        return (f"{{% for message in messages %}}{body}{turn}{{% endfor %}}{{% if add_generation_prompt %}}"
            f"{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}{end}")
    return _template(rng, 0)


def _template(rng: random.Random, depth: int) -> str:
    made = []
    for _ in range(rng.choice((0, 1, 1, 2, 3) if depth else (1, 2, 3, 5))):
        inner = _template(rng, depth + 1) if depth < 4 else "x"
        value = _expression(rng, 0)
        made.append(rng.choice([f"{{{{ {value} }}}}", f"{{{{- {value} -}}}}", rng.choice(WORDS),
            f"{{% if {value} %}}{inner}{{% endif %}}",
            f"{{% if {value} %}}{inner}{{% elif {value} %}}{{% else %}}{inner}{{% endif %}}",
            f"{{% for x in {value} %}}{inner}{{% endfor %}}",
            f"{{% for message in messages %}}{inner}{{% else %}}y{{% endfor %}}", f"{{% set x = {value} %}}",
            "{% set ns = namespace(x=0) %}", f"{{% set ns.x = {value} %}}", f"{{% set x %}}{inner}{{% endset %}}",
            f"{{% macro f(n) %}}{inner}{{% endmacro %}}", f"{{% generation %}}{inner}{{% endgeneration %}}",
            "{% break %}", "{% continue %}", "{# note #}", "{% raw %}{{{% endraw %}",
            f"{{% filter upper %}}{inner}{{% endfilter %}}", f"{{% call f(1) %}}{inner}{{% endcall %}}",
            "{% include 'x' %}", "{% extends 'x' %}", "{% import 'os' as os %}",
            f"{{% with x = {value} %}}{inner}{{% endwith %}}", "{% endif %}", "{% for %}", "{{", "{%",
            "{% block a %}{% endblock %}", f"{{% autoescape true %}}{inner}{{% endautoescape %}}",
            "{% do messages.append(1) %}", "{% debug %}"]))
    return "".join(made)


def _expression(rng: random.Random, depth: int) -> str:
    if depth > 2 or rng.random() < 0.5:
        return rng.choice(EXPRESSIONS)
    one, other = (_expression(rng, depth + 1) for _ in range(2))
    return rng.choice([f"{one} {rng.choice(OPERATORS)} {other}", f"({one})", f"not {one}",
        f"{one} if {other} else {one}", f"{one}[{other}]",
        f"{one}.{rng.choice(('x', 'role', 'items()', '__class__'))}",
        f"{one} | {rng.choice(FILTERS)}",
        f"{one} is {rng.choice(TESTS)}",
        f"{one}[1:]", f"{one}({other})"])

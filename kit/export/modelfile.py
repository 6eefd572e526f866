"""An Ollama Modelfile written from the trained chat template, and proven equal to it.

Ollama renders a Go text/template over `.Messages` (each with `.Role` and `.Content`; neighbours of one role
come joined, but for tools' results), system messages among them, and lets the model go on where a last assistant
message ends (https://github.com/ollama/ollama, template/template.go and docs/template.md). Go templates cannot run
Jinja, so the trained template is rendered with marked contents: the text between two marks depends only on the roles on
either side, and the Modelfile's template is that table of texts.
"""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from kit.common.errors import KitError
from kit.common.files import write_text
from kit.models import template
from kit.models.template import Message
from kit.recipe.recipe import Recipe

# What the template writes between two neighbours: {(role before, role after): text}.
Joints = dict[tuple[str, str], str]
Render = Callable[[list[Message]], str]
START, END = "", "end"

TURN, TURNS = ("user",), ("user", "assistant", "user")
SHAPES = [TURN, TURNS, ("user", "assistant", "user", "assistant", "user")]
SYSTEM_SHAPES = [("system", *TURN), ("system", *TURNS)]
# Taken over where the trained template has them in the same form; a message that fits nowhere is left out.
RARE_SHAPES = [("user", "assistant", "system", "user"), ("user", "system", "user"), ("assistant", "user"),
               ("system", "assistant", "user")]
# A tool's result answers a call that the assistant wrote as text.
TOOL_SHAPES = [(*first, "user", "assistant", "tool", *rest) for first in ((), ("system",))
               for rest in ((), ("tool",), ("assistant", "user"), ("assistant", "tool"))]

ASKED = {"role": "user", "content": "a"}
TOOLS = json.dumps([{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {
    "type": "object", "properties": {}}}}])

PROOF = [
    "Where is my parcel?",
    "It left the store on Monday.",
    '他说："请在{{ .System }}里写 {% raw %} 和 C:\\temp\\n"，好吗？',
    '{"city": "北京", "quote": "\'\\"}}{{"}\n\n```json\n[1, 2]\n```',
    "One line\n\n  and an indented one, 100 %\t<b>& more</b> 🙂",
]


class Modelfile(NamedTuple):
    """What a Modelfile consists of, but for the GGUF that it names; `notes` are the comments on top."""

    joints: Joints
    stops: list[str]
    num_ctx: int
    system: str
    notes: list[str]

    def text(self, gguf_name: str) -> str:
        """The file for the GGUF of that name beside it."""
        system = [f'SYSTEM """{self.system}"""'] if self.system else []
        stops = [f'PARAMETER stop "{token}"' for token in self.stops]
        return "\n".join([*(f"# {note}" for note in self.notes), f"FROM ./{gguf_name}",
                          f'TEMPLATE """{go_template(self.joints)}"""', *system, *stops,
                          f"PARAMETER num_ctx {self.num_ctx}", ""])

    def prompt(self, messages: list[Message]) -> str:
        """What Ollama sends to the model for these messages, without the BOS it may add."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return fill(self.joints, messages)

    def takes(self, messages: list[Message]) -> bool:
        """Whether the template has a place for each of these messages. Ollama writes tools and calls in its own way."""
        if any(m.get("tools") or m.get("tool_calls") for m in messages):
            return False
        return all(pair in self.joints for pair in pairwise([START, *(m["role"] for m in messages)]))


def write_modelfile(path: Path, gguf_name: str, tokenizer: Any, num_ctx: int,
                    template_kwargs: dict[str, Any] | None = None, system: str = "") -> Path:
    """Write the Modelfile at `path` for the file `gguf_name` beside it; return `path`.

    The template is the tokenizer's chat template with `template_kwargs`, the stop tokens are those that end
    its answers, `num_ctx` is in tokens. `system` is the system prompt that every trained conversation had, if
    any; none is invented. Raises KitError when Ollama's template language cannot express the chat template.
    """
    write_text(path, _modelfile(tokenizer, num_ctx, template_kwargs or {}, system).text(gguf_name))
    return path


def modelfile_of(recipe: Recipe, tokenizer: Any) -> Modelfile:
    """The Modelfile that a run of this recipe writes; errors as of `write_modelfile`."""
    return _modelfile(tokenizer, recipe.num_ctx or recipe.max_seq_length, template.template_kwargs(recipe),
                      recipe.system_prompt or "")


def _modelfile(tokenizer: Any, num_ctx: int, options: dict[str, Any], system: str) -> Modelfile:
    if not tokenizer.chat_template:
        raise KitError("the tokenizer holds no chat template to write a Modelfile from",
                       "export from the run's adapter or merged folder: its tokenizer holds the trained one")
    if '"""' in system:
        raise KitError('the system prompt holds """, which ends a text in a Modelfile',
                       "write it with other quotes")

    def render(messages: list[Message]) -> str:
        return template.rendered(tokenizer, messages, add_generation_prompt=True, **options)

    joints = derive(render)
    notes = limits(joints, render, tokenizer)
    bos = added_bos(tokenizer)
    joints = {pair: text.removeprefix(bos) if pair[0] == START else text for pair, text in joints.items()}
    return Modelfile(joints, stop_tokens(joints, tokenizer), num_ctx, system, notes)


def derive(render: Render) -> Joints:
    """The texts between neighbours, read off renderings whose contents are marks, and proven on PROOF's.

    Raises KitError when a text depends on more than its two neighbours, or a message is lost, moved or changed.
    """
    joints: Joints = {}
    for shape in (*SHAPES, *SYSTEM_SHAPES, *RARE_SHAPES, *TOOL_SHAPES):
        marks = [f"\ue020{number}\ue021" for number in range(len(shape))]
        text = _try(render, _conversation(shape, marks))
        if shape not in SHAPES + SYSTEM_SHAPES and "system" in shape and (START, "system") not in joints:
            continue  # a template that refuses a first system message may take a later one for an answer
        if text is None or ("system" in shape and marks[shape.index("system")] not in text):
            if shape in SHAPES:
                raise _inexpressible(f"it refuses a conversation of {' → '.join(shape)}")
            continue  # a template without a system role, or without this order of roles
        try:
            joints = _with(joints, shape, text, marks)
        except KitError:
            if shape in SHAPES + SYSTEM_SHAPES:
                raise
    for messages in proof_conversations((START, "system") in joints):
        trained, written = _try(render, messages), fill(joints, messages)
        if trained is None:
            raise _inexpressible(f"it refuses {' → '.join(m['role'] for m in messages)} for what they say")
        if trained != written:
            raise _inexpressible("it writes {!r}, where Ollama would write {!r}".format(
                *around_difference(trained, written)))
    tools = [shape for shape in TOOL_SHAPES if _all_in(joints, shape)]
    if any(shape[0] == "user" and shape not in tools for shape in TOOL_SHAPES) \
            or any(fill(joints, messages) != _try(render, messages) for messages in _proofs(tools)):
        joints = {pair: text for pair, text in joints.items() if "tool" not in pair}
    return joints


def _all_in(joints: Joints, shape: tuple[str, ...]) -> bool:
    return all(pair in joints for pair in pairwise([START, *shape, END]))


def _with(joints: Joints, shape: tuple[str, ...], text: str, marks: list[str]) -> Joints:
    """`joints` and those of one rendering; KitError if a message is not in its place or two texts differ."""
    mark = "\ue020\\d+\ue021"
    if re.findall(mark, text) != marks:
        raise _inexpressible(f"in {' → '.join(shape)} it repeats, drops or moves a message")
    joints = dict(joints)
    for pair, joint in zip(pairwise([START, *shape, END]), re.split(mark, text), strict=True):
        if joints.setdefault(pair, joint) != joint:
            raise _inexpressible(f"between {pair[0] or 'the start'} and {pair[1]} it writes {joints[pair]!r}, "
                                 f"but also {joint!r} (in {' → '.join(shape)})")
    return joints


def _conversation(roles: tuple[str, ...], contents: list[str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def fill(joints: Joints, messages: list[Message]) -> str:
    """What the Modelfile's template makes of a conversation: the same steps as `go_template`, in Python."""
    text, previous = "", START
    for number, message in enumerate(messages):
        pair = (previous, message["role"])
        if pair in joints:
            last = number == len(messages) - 1
            text += _opening(joints, pair, last) + message["content"]
            previous = message["role"]
    return text + joints.get((previous, END), "")


def go_template(joints: Joints) -> str:
    """The Go text/template: one line for each pair of neighbours; every text is a quoted Go string."""
    lines = ['{{- $previous := "" }}', "{{- range $i, $message := .Messages }}"]
    start = "if"
    for pair in (pair for pair in joints if pair[1] != END):
        text, last = _quoted(joints[pair]), _quoted(_opening(joints, pair, last=True))
        if last != text:
            text = (f"if eq (len (slice $.Messages $i)) 1 }}}}{{{{ {last} }}}}{{{{ else }}}}"
                    f"{{{{ {text} }}}}{{{{ end")
        lines.append(f'{{{{- {start} and (eq $previous "{pair[0]}") (eq .Role "{pair[1]}") }}}}'
                     f"{{{{ {text} }}}}{{{{ .Content }}}}{{{{ $previous = .Role }}}}")
        start = "else if"
    lines += ["{{- end }}", "{{- end }}",
              *(f'{{{{- if eq $previous "{role}" }}}}{{{{ {_quoted(text)} }}}}{{{{ end }}}}'
                for (role, after), text in joints.items() if after == END)]
    return "\n".join(lines)


def proof_conversations(system: bool) -> list[list[Message]]:
    """One turn and several, each text of PROOF in each place; `system` adds those that begin with one."""
    return _proofs(SHAPES + (SYSTEM_SHAPES if system else []))


def _proofs(shapes: list[tuple[str, ...]]) -> list[list[Message]]:
    return [_conversation(shape, (PROOF * 2)[first:first + len(shape)])
            for shape in shapes for first in range(len(PROOF))]


def limits(joints: Joints, render: Render, tokenizer: Any) -> list[str]:
    """What the trained template does and Ollama's cannot: one line each, for the top of the Modelfile."""
    bos = added_bos(tokenizer)
    spaced = [{"role": "user", "content": " a \n"}]
    thought = _conversation(TURNS, ["a", "<think>\nb\n</think>\n\nc", "d"])
    notes = {
        "The trained template strips the space around a message; Ollama's cannot.":
            _try(render, spaced) != fill(joints, spaced),
        "The trained template rewrites <think> in earlier answers; Ollama's cannot.":
            _try(render, thought) != fill(joints, thought),
        "The trained template has no system message: one that is sent is left out.": (START, "system") not in joints,
        "The trained template has tools' results in a form that Ollama's cannot have: one that is sent is left out.":
            any(_try(render, _conversation(shape, ["a"] * len(shape))) and not _all_in(joints, shape)
                for shape in TOOL_SHAPES if shape[0] == "user"),
        "The trained template shows tools to the model; Ollama's cannot, as it writes JSON in another way: use "
        "llama-server --jinja, or vLLM with merged/.":
            _try(render, [ASKED | {"tools": TOOLS}]) != fill(joints, [ASKED]),
        "The trained template writes today's date; here it is the date of the export.":
            "strftime_now" in str(tokenizer.chat_template),
        f"Ollama puts {bos} before every prompt; the trained template does not.":
            not joints[START, "user"].startswith(bos)}
    return [note for note, applies in notes.items() if applies]


def stop_tokens(joints: Joints, tokenizer: Any) -> list[str]:
    """The tokenizer's EOS and the token right after an assistant's content."""
    ending = joints["assistant", "user"]
    after = [token for token in map(str, tokenizer.added_tokens_decoder.values()) if ending.startswith(token)]
    return list(dict.fromkeys(filter(None, [tokenizer.eos_token, max(after, key=len, default=None)])))


def added_bos(tokenizer: Any) -> str:
    """The BOS that Ollama puts before a prompt by itself (the GGUF's add_bos_token), '' for none."""
    adds = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if adds else ""


def _opening(joints: Joints, pair: tuple[str, str], last: bool) -> str:
    """The text before a message; a last assistant message is a started answer and opens as one."""
    return joints["user", END] if last and pair == ("user", "assistant") else joints[pair]


def around_difference(first: str, second: str) -> tuple[str, str]:
    """The places, with 30 characters on either side, where two texts begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
              min(len(first), len(second)))
    return first[max(0, at - 30):at + 30], second[max(0, at - 30):at + 30]


def _try(render: Render, messages: list[Message]) -> str | None:
    """The rendering, or None when the template refuses the conversation, or fails for want of `tools`."""
    try:
        return render(messages)
    except TemplateError:
        return None


def _quoted(text: str) -> str:
    """A Go string constant. Quotes are escaped by number: a triple one would end the Modelfile's text."""
    named = {"\\": "\\\\", '"': "\\x22", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(named.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def _inexpressible(difference: str) -> KitError:
    return KitError(f"this chat template cannot be written as an Ollama template: {difference}",
                    "use the GGUF with llama.cpp (its embedded template is the trained one), or train with "
                    "prompt_style: chatml")

"""The template gate: conversations become the same token ids in training, in the GGUF and through the Modelfile."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

from kit.common.errors import KitError
from kit.export.modelfile import around_difference, modelfile_of
from kit.gguf.child import LlamaChild
from kit.models.template import Message, render, rendered, template_kwargs, with_system
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.provenance import export_again

ALSO = 8  # held-out conversations looked at besides those below
CHINESE = "他说：“请把订单 №2024-11 改到周五下午三点，好吗？”\n谢谢！🙂"
CODE = 'def f(x):\n\treturn {"a": [x, 1e-3]}  # {{ not a template }} {% nor this %}\n\n\n'
ANSWER = {"role": "assistant", "content": "It left on Monday, 11/2024.\n\n- one\n- 二"}
TALKS: dict[str, list[Message]] = {
    "one turn": [{"role": "user", "content": "Where is my parcel?"}],
    "Chinese": [{"role": "user", "content": CHINESE}],
    "empty": [{"role": "user", "content": ""}],
    "code and numbers": [{"role": "user", "content": "Explain 1234567 and 3.14159:\n" + CODE.strip()}],
    "system": [{"role": "system", "content": "You answer in one line."}, {"role": "user", "content": "Why?"}],
    "several turns": [{"role": "user", "content": "Where is it?"}, ANSWER, {"role": "user", "content": CHINESE}],
    "system and several turns": [{"role": "system", "content": CHINESE}, {"role": "user", "content": "a"}, ANSWER,
                                 {"role": "user", "content": "b"}, ANSWER, {"role": "user", "content": "c"}],
}


class Case(NamedTuple):
    """A conversation up to where the answer begins, as the trainer's tokenizer renders it."""

    name: str
    messages: list[Message]
    options: dict[str, Any]  # template variables
    text: str
    ids: list[int]
    usual: bool  # rendered with the recipe's own variables, as the Modelfile is


def cases(tokenizer: Any, recipe: Recipe, held_out: list[list[Message]]) -> Iterator[Case]:
    """The conversations of TALKS and the first held-out ones; a template's refusals are left out.

    With a template that can think, those of TALKS come also with enable_thinking on and off.
    """
    talks = {**TALKS, **{f"held-out row {i + 1}": row[:-1] if row[-1]["role"] == "assistant" else row
                         for i, row in enumerate(held_out[:ALSO])}}
    settings: list[tuple[str, Recipe]] = [("", recipe)]
    if "enable_thinking" in str(tokenizer.chat_template):
        settings += [(f", thinking {'on' if value else 'off'}", recipe.model_copy(update={"enable_thinking": value}))
                     for value in (True, False)]
    for suffix, variant in settings:
        for name, messages in (talks if not suffix else TALKS).items():
            try:
                text = render(tokenizer, messages, variant, add_generation_prompt=True)
            except KitError:
                continue
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            yield Case(name + suffix, with_system(messages, variant), template_kwargs(variant), text, ids, not suffix)


def check_folder_template(gates: Gates, folder: Path, conversations: list[Case], tokenizer: Any) -> None:
    """Add `template <folder>`: the tokenizer and template that lie in a Hugging Face folder, as vLLM would use them."""
    cause = _first_difference(
        conversations, tokenizer, folder.name,
        lambda case: rendered(tokenizer, case.messages, add_generation_prompt=True, **case.options),
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    gates.check(f"template {folder.name}", not cause, f"{len(conversations)} conversations", "the training's token ids",
                cause, export_again(folder.name))


def check_gguf_template(gates: Gates, name: str, child: LlamaChild, tokenizer: Any, conversations: list[Case],
                        hint: str = "") -> None:
    """Add `template <name>`: the GGUF's embedded template, as llama-cpp-python renders and splits it.

    `hint` is what to do when it fails; by default the command that converts again.
    """
    if child.metadata().get("tokenizer.chat_template"):
        cause = _first_difference(conversations, tokenizer, "the GGUF",
                                  lambda case: child.render(case.messages, case.options), child.tokenize)
    else:
        cause = "the GGUF holds no chat template: llama.cpp would use another one"
    gates.check(f"template {name}", not cause, f"{len(conversations)} conversations", "the training's token ids", cause,
                hint or export_again(name))


def check_modelfile(gates: Gates, path: Path, child: LlamaChild, tokenizer: Any, conversations: list[Case],
                    recipe: Recipe) -> None:
    """Add `template Modelfile`: it is what the kit writes, and that gives the training's token ids.

    The ids are those of its template over the GGUF's vocabulary, with the BOS that Ollama puts before it.
    """
    with gates.guard("template Modelfile"):
        modelfile = modelfile_of(recipe, tokenizer)
        add_bos = child.adds_bos()
        bos = str(tokenizer.bos_token) if add_bos else ""

        def rendered(case: Case) -> str:
            first, *rest = case.messages
            # The recipe's system prompt is left to the Modelfile's own SYSTEM.
            own = modelfile.system and first == {"role": "system", "content": modelfile.system}
            return bos + modelfile.prompt(rest if own else case.messages)

        # The Modelfile itself says what Ollama can't do: a system message or a tool's result it has no place for.
        usual = [case for case in conversations if case.usual and modelfile.takes(case.messages)]
        cause = _other_line(path, modelfile.text(child.gguf.name)) or _first_difference(
            usual, tokenizer, "the Modelfile", rendered,
            lambda text: child.tokenize(text.removeprefix(bos), add_bos=add_bos))
        gates.check("template Modelfile", not cause, f"{len(usual)} conversations", "the training's token ids", cause,
                    f"{export_again()} writes it again")


def _other_line(path: Path, expected: str) -> str:
    """The first line of the file that differs from the expected text, and what should stand there; '' for none."""
    # Not as text: carriage returns are sent to the model too.
    written = path.read_bytes().decode("utf-8", errors="backslashreplace")
    lines = zip_longest(written.split("\n"), expected.split("\n"))
    number, line, due = next(((n, a, b) for n, (a, b) in enumerate(lines, start=1) if a != b), (0, None, None))
    shown = around_difference(line or "", due or "")
    return f"line {number} of the Modelfile has {shown[0]!r}, the kit writes {shown[1]!r}" if number else ""


def _first_difference(conversations: list[Case], tokenizer: Any, where: str, rendered: Callable[[Case], str],
                      split: Callable[[str], list[int]]) -> str:
    """The first conversation that `where` renders or splits in another way than the training; '' for none."""
    for case in conversations:
        text = rendered(case)
        if text != case.text:
            trained, shipped = around_difference(case.text, text)
            return f"{case.name}: the training has {trained!r}, {where} {shipped!r}"
        ids = split(text)
        if ids != case.ids:
            at = next(i for i, (a, b) in enumerate(zip_longest(case.ids, ids)) if a != b)
            parts = (case.ids[at:at + 4], ids[at:at + 4])
            names = [f"{part} {tokenizer.convert_ids_to_tokens(part)}" for part in parts]
            return (f"{case.name}: after {tokenizer.decode(case.ids[max(0, at - 8):at])!r} (token {at}) the training "
                    f"has {names[0]}, {where} {names[1]}")
    return ""

"""The template gate: conversations become the same token ids in training, in the GGUF and through the Modelfile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

from transformers import AutoTokenizer

from kit.common.errors import KitError
from kit.export.modelfile import around_difference
from kit.export.modelfile_reader import Modelfile, read_modelfile
from kit.gguf.child import LlamaChild
from kit.models.template import Message, render, with_system
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates

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
            options = {} if variant.enable_thinking is None else {"enable_thinking": variant.enable_thinking}
            yield Case(name + suffix, with_system(messages, variant), options, text, ids, not suffix)


def check_folder_template(gates: Gates, folder: Path, every: list[Case]) -> None:
    """Add `template <folder>`: the tokenizer and template that lie in a Hugging Face folder, as vLLM would use them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rendered(case: Case) -> str:
        return str(tokenizer.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=True,
                                                 **case.options))

    cause = _first_difference(every, tokenizer, folder.name, rendered,
                              lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    gates.check(f"template {folder.name}", not cause, f"{len(every)} conversations", "the training's token ids", cause,
                "merge again: kit.merge takes tokenizer and template from the adapter's folder")


def check_gguf_template(gates: Gates, name: str, child: LlamaChild, tokenizer: Any, every: list[Case]) -> None:
    """Add `template <name>`: the GGUF's embedded template, as llama-cpp-python renders and splits it."""
    if child.metadata().get("tokenizer.chat_template"):
        cause = _first_difference(every, tokenizer, "the GGUF", lambda case: child.render(case.messages, case.options),
                                  child.tokenize)
    else:
        cause = "the GGUF holds no chat template: llama.cpp would use another one"
    gates.check(f"template {name}", not cause, f"{len(every)} conversations", "the training's token ids", cause,
                "export again from the folder whose tokenizer holds the trained template")


def check_modelfile(gates: Gates, path: Path, child: LlamaChild, tokenizer: Any, every: list[Case],
                    system: str) -> None:
    """Add `template Modelfile`: its template over the GGUF's vocabulary, with the BOS that Ollama puts before it."""
    with gates.guard("template Modelfile"):
        modelfile = read_modelfile(path)
        add_bos = bool(child.ends()["add_bos"])
        cause, count = "", 0
        if modelfile.gguf != child.gguf.name:
            cause = f"FROM names {modelfile.gguf}, which is not {child.gguf.name}"
        for case in every:
            if cause or not case.usual or _beyond(modelfile, case):
                continue
            count += 1
            messages = case.messages
            if system and messages[0] == {"role": "system", "content": system}:
                messages = messages[1:]  # the Modelfile's own SYSTEM has to bring it
            text = modelfile.prompt(messages)
            ids = child.tokenize(text, add_bos=add_bos)
            if ids != case.ids:
                bos = str(tokenizer.bos_token) if add_bos else ""
                cause = f"{case.name}: " + (_texts(case.text, bos + text, "the Modelfile") if bos + text != case.text
                                            else _tokens(tokenizer, case.ids, ids, "the Modelfile"))
        gates.check("template Modelfile", not cause, f"{count} conversations", "the training's token ids", cause,
                    "write the Modelfile again: kit.write_modelfile")


def _first_difference(every: list[Case], tokenizer: Any, where: str, rendered: Callable[[Case], str],
                      split: Callable[[str], list[int]]) -> str:
    """The first conversation that `where` renders or splits in another way than the training, told; '' for none."""
    for case in every:
        text = rendered(case)
        if text != case.text:
            return f"{case.name}: {_texts(case.text, text, where)}"
        if (ids := split(text)) != case.ids:
            return f"{case.name}: {_tokens(tokenizer, case.ids, ids, where)}"
    return ""


def _beyond(modelfile: Modelfile, case: Case) -> bool:
    """What the Modelfile itself says Ollama can't do: a system message the template has none for."""
    return any(m["role"] == "system" for m in case.messages) and ("", "system") not in modelfile.joints


def _texts(trained: str, shipped: str, where: str) -> str:
    expected, found = around_difference(trained, shipped)
    return f"the training has {expected!r}, {where} {found!r}"


def _tokens(tokenizer: Any, trained: list[int], shipped: list[int], where: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(trained, shipped, strict=False)) if a != b),
              min(len(trained), len(shipped)))
    before = tokenizer.decode(trained[max(0, at - 8):at])
    names = [f"{ids[at:at + 4]} {tokenizer.convert_ids_to_tokens(ids[at:at + 4])}" for ids in (trained, shipped)]
    return f"after {before!r} (token {at}) the training has {names[0]}, {where} {names[1]}"

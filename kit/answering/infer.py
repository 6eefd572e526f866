"""Answers, streamed or in batches, from a model in memory or from a GGUF file."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kit.common.unsloth

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kit.common.errors import GateError
from kit.common.padding import padded
from kit.common.show import bar
from kit.gguf.child import LlamaChild
from kit.models.template import Message, prompt_ids, template_kwargs, with_system
from kit.recipe.recipe import Recipe


class Reply(NamedTuple):
    """An answer, whether the model stopped by itself (not cut off at max_new_tokens), and its token ids.

    The ids are without the stop token, and empty for an answer of llama.cpp.
    """

    text: str
    stopped: bool
    ids: tuple[int, ...] = ()


def _messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def sampling(recipe: Recipe) -> dict[str, Any]:
    """The recipe's inference fields as `generate` takes them; greedy at temperature 0."""
    wish: dict[str, Any] = {"max_new_tokens": recipe.max_new_tokens, "do_sample": recipe.temperature > 0}
    if recipe.repetition_penalty != 1:
        wish["repetition_penalty"] = recipe.repetition_penalty
    if recipe.temperature > 0:
        wish |= {"temperature": recipe.temperature, "top_p": recipe.top_p, "top_k": recipe.top_k}
        if recipe.min_p:
            wish["min_p"] = recipe.min_p
    else:
        # A model's own generation_config may carry these; greedy decoding has no use for them.
        wish |= {"temperature": None, "top_p": None, "top_k": None}
    return wish


def gguf_sampling(recipe: Recipe) -> dict[str, Any]:
    """The same fields under llama-cpp-python's names."""
    return {"max_new_tokens": recipe.max_new_tokens, "temperature": recipe.temperature, "top_p": recipe.top_p,
            "top_k": recipe.top_k, "min_p": recipe.min_p, "repeat_penalty": recipe.repetition_penalty}


def stream(model: Any, tokenizer: PreTrainedTokenizerBase | None, prompt: str | list[Message],
           recipe: Recipe | None = None) -> Iterator[str]:
    """The answer token by token. `model` is a model in memory, or the path of a GGUF file (tokenizer None).

    `prompt` is a question or a list of messages; the recipe brings template settings and sampling.
    """
    recipe = recipe or Recipe.load({})
    if isinstance(model, (str, Path)):
        with LlamaChild(Path(model), n_ctx=recipe.num_ctx or recipe.max_seq_length,
                        template_kwargs=template_kwargs(recipe)) as child:
            yield from child.stream(with_system(_messages(prompt), recipe), **gguf_sampling(recipe))
        return
    assert tokenizer is not None
    yield from _stream_in_memory(model, tokenizer, _messages(prompt), recipe)


def _stream_in_memory(model: Any, tokenizer: Any, messages: list[Message], recipe: Recipe) -> Iterator[str]:
    _for_inference(model)
    ids = torch.tensor([prompt_ids(tokenizer, messages, recipe)], device=model.device)
    tokens: queue.Queue[list[int] | BaseException | None] = queue.Queue()
    unread = threading.Event()

    class Streamer(BaseStreamer):  # type: ignore[misc]
        """Hands on every token as it comes; transformers' TextStreamer waits for the next space."""

        def put(self, value: Any) -> None:
            if unread.is_set():
                raise InterruptedError("nobody reads the answer any more")
            tokens.put(value.reshape(-1).tolist())

        def end(self) -> None:
            tokens.put(None)

    def work() -> None:
        try:
            with torch.no_grad():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=Streamer(),
                               pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                               **sampling(recipe))
        except BaseException as error:  # handed to the reader, who would wait for ever otherwise
            tokens.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        line: list[int] = []
        shown = ""
        prompt_passed = False
        while (new := tokens.get()) is not None:
            if isinstance(new, BaseException):
                raise new
            if not prompt_passed:  # the streamer gets the prompt first
                prompt_passed = True
                continue
            line += new
            text = tokenizer.decode(line, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue  # the first bytes of a character that takes several tokens
            if len(text) > len(shown):
                yield text[len(shown):]
            # Decoding starts afresh with each line: a token of a long answer costs no more than one of a short.
            line, shown = ([], "") if text.endswith("\n") else (line, text)
    finally:
        unread.set()
        thread.join()  # torch must not be at work when the process ends


def answer(model: Any, tokenizer: PreTrainedTokenizerBase | None, prompts: list[list[Message]],
           recipe: Recipe, batch_size: int = 20) -> list[Reply]:
    """Answers in the order of `prompts`, with a progress bar; batches are of like length, padded on the left."""
    if isinstance(model, (str, Path)):
        return _answer_gguf(Path(model), prompts, recipe)
    assert tokenizer is not None
    rows = [prompt_ids(tokenizer, messages, recipe) for messages in prompts]
    replies: dict[int, Reply] = {}
    with bar(len(rows), "answering", "row") as progress:
        for batch in by_length([len(ids) for ids in rows], batch_size):
            found = answer_batch(model, tokenizer, [rows[i] for i in batch], recipe)
            replies.update(zip(batch, found, strict=True))
            progress.update(len(batch))
    return [replies[i] for i in range(len(rows))]


def by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Places in `lengths`, in batches of like length; the longest first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def answer_batch(model: Any, tokenizer: Any, rows: list[list[int]], recipe: Recipe) -> list[Reply]:
    """The answers to prompts given as token ids, from one batch."""
    out = generate(model, tokenizer, rows, **sampling(recipe))
    replies = []
    for new in out[:, max(map(len, rows)):].tolist():
        stopped = tokenizer.eos_token_id in new
        if stopped:
            new = new[: new.index(tokenizer.eos_token_id)]
        replies.append(Reply(tokenizer.decode(new, skip_special_tokens=True), stopped, tuple(new)))
    return replies


def generate(model: Any, tokenizer: Any, rows: list[list[int]], **how: Any) -> Any:
    """What `model.generate` returns for prompts given as token ids, in one batch; `how` are its keywords."""
    _for_inference(model)
    ids, mask = padded(rows, tokenizer.pad_token_id, left=True)
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **how)


def same_answers(before: list[Reply], after: list[Reply], what: str) -> None:
    """Print that `what` answers as before; GateError with the first answer that differs (greedy decoding only)."""
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        if old != new:
            raise GateError(f"{what} does not answer like the model in memory; answer {number}: "
                            f"{old.text[:80]!r} became {new.text[:80]!r}",
                            "the saved files are not what was trained: don't ship them, train again")
    print(f"{what}: loaded again, {len(after)} of {len(after)} answers are the same")


def _answer_gguf(path: Path, prompts: list[list[Message]], recipe: Recipe) -> list[Reply]:
    replies = []
    with LlamaChild(path, n_ctx=recipe.num_ctx or recipe.max_seq_length,
                    template_kwargs=template_kwargs(recipe)) as child, \
            bar(len(prompts), f"answering with {path.name}", "row") as progress:
        for messages in prompts:
            text = "".join(child.stream(with_system(messages, recipe), **gguf_sampling(recipe)))
            replies.append(Reply(text, child.finish_reason == "stop"))
            progress.update()
    return replies


def _for_inference(model: Any) -> None:
    """Unsloth's switch where the model has it (KV cache on, dropout off)."""
    if hasattr(model, "for_inference"):
        model.for_inference()
    else:
        model.eval()

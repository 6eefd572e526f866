"""Answers from a model in memory: token by token, or a batch at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import kit.common.unsloth

import torch
from transformers.generation.streamers import BaseStreamer

from kit.answering.replies import Reply, by_length, sampling
from kit.common.padding import padded
from kit.common.show import bar
from kit.models.template import Message, prompt_ids
from kit.recipe.recipe import Recipe


class _TokenStream(BaseStreamer):  # type: ignore[misc]
    """Hands every token on as it comes; transformers' TextStreamer waits for the next space."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self.abandoned = threading.Event()

    def put(self, value: Any) -> None:
        """What `generate` calls with the prompt, and then with each token."""
        if self.abandoned.is_set():
            raise InterruptedError("nobody reads the answer any more")
        self.tokens.put(value.reshape(-1).tolist())

    def end(self) -> None:
        """What `generate` calls after the last token."""
        self.tokens.put(None)

    def __iter__(self) -> Iterator[list[int]]:
        """The new tokens; raises what ended `generate`."""
        prompt_passed = False
        while (new := self.tokens.get()) is not None:
            if isinstance(new, BaseException):
                raise new
            if prompt_passed:
                yield new
            prompt_passed = True


def stream_in_memory(model: Any, tokenizer: Any, messages: list[Message], recipe: Recipe) -> Iterator[str]:
    """The answer token by token, generated in a thread."""
    _for_inference(model)
    ids = torch.tensor([prompt_ids(tokenizer, messages, recipe)], device=model.device)
    streamer = _TokenStream()

    def work() -> None:
        try:
            with torch.no_grad():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer,
                               pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                               **sampling(recipe))
        except BaseException as error:  # handed to the reader, who would wait for ever otherwise
            streamer.tokens.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from _text_of(streamer, tokenizer)
    finally:
        streamer.abandoned.set()
        thread.join()  # torch must not be at work when the process ends


def _text_of(streamer: _TokenStream, tokenizer: Any) -> Iterator[str]:
    line: list[int] = []
    shown = ""
    for new in streamer:
        line += new
        text = tokenizer.decode(line, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            continue  # the first bytes of a character that takes several tokens
        if len(text) > len(shown):
            yield text[len(shown):]
        # Decoding starts afresh with each line: a token of a long answer costs no more than one of a short.
        line, shown = ([], "") if text.endswith("\n") else (line, text)


def answer_in_memory(model: Any, tokenizer: Any, prompts: list[list[Message]], recipe: Recipe,
                     batch_size: int) -> list[Reply]:
    """Answers in the order of `prompts`; batches are of like length, padded on the left."""
    rows = {number: prompt_ids(tokenizer, messages, recipe) for number, messages in enumerate(prompts)}
    replies: dict[int, Reply] = {}
    with bar(len(rows), "answering", "row") as progress:
        for batch in by_length(rows, batch_size):
            replies |= zip(batch, answer_batch(model, tokenizer, [rows[i] for i in batch], recipe), strict=True)
            progress.update(len(batch))
    return [replies[number] for number in rows]


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


def generate(model: Any, tokenizer: Any, rows: list[list[int]], **options: Any) -> Any:
    """What `model.generate` returns for prompts given as token ids, in one batch; `options` are its keywords."""
    _for_inference(model)
    ids, mask = padded(rows, tokenizer.pad_token_id, left=True)
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **options)


def _for_inference(model: Any) -> None:
    """Unsloth's switch where the model has it (KV cache on, dropout off)."""
    if hasattr(model, "for_inference"):
        model.for_inference()
    else:
        model.eval()

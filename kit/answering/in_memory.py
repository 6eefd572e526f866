"""Answers from a model in memory: token by token, or a batch at once; and the gate that a batch changes none of them.

Prompts answered together, padded to one width, must get what each gets alone.
With the starter model a wrong attention mask or side of padding shifts log probabilities by 10 nats and more, rounding
by 0.00005 in float32 and up to 0.9 in bfloat16: there the order in which a batch adds up decides near ties. Trained, 59
of 60 greedy answers are the same token for token in bfloat16; untrained, and sure of little, 35 of 60, and in float32
30 of 30. So what is compared is what the model computes in float32.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import kit.common.unsloth

import torch
from transformers.generation.streamers import BaseStreamer

from kit.answering.replies import Reply, sampling
from kit.common.errors import GateError
from kit.common.padding import padded
from kit.models.load import make_room
from kit.models.precision import in_float32
from kit.models.template import Message, prompt_ids
from kit.recipe.recipe import Recipe

ROWS, STEPS = 4, 4  # prompts compared, and tokens generated for each
LONGEST = 512  # tokens of a prompt that is compared, where there are two as short
TOP = 20  # likeliest tokens compared at each step
ALLOWED_FLOAT32, ALLOWED_16BIT = 0.01, 2.0  # nats between two log probabilities


class _TokenStream(BaseStreamer):  # type: ignore[misc]
    """Hands every token on as it comes; transformers' TextStreamer waits for the next space."""

    def __init__(self) -> None:
        self.tokens: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self.prompt_passed = False
        self.abandoned = threading.Event()

    def put(self, value: Any) -> None:
        """What `generate` calls with the prompt, and then with each token."""
        if self.abandoned.is_set():
            raise InterruptedError("nobody reads the answer any more")
        if self.prompt_passed:
            self.tokens.put(value.reshape(-1).tolist())
        self.prompt_passed = True

    def end(self) -> None:
        """What `generate` calls after the last token."""
        self.tokens.put(None)


def stream_in_memory(model: Any, tokenizer: Any, messages: list[Message], recipe: Recipe) -> Iterator[str]:
    """The answer token by token, generated in a thread."""
    ids = prompt_ids(tokenizer, messages, recipe)
    streamer = _TokenStream()

    def work() -> None:
        try:
            generate(model, tokenizer, [ids], streamer=streamer, **sampling(recipe))
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
    while (new := streamer.tokens.get()) is not None:
        if isinstance(new, BaseException):
            raise new
        line += new
        text = tokenizer.decode(line, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            continue  # the first bytes of a character that takes several tokens
        if len(text) > len(shown):
            yield text[len(shown):]
        # Decoding starts afresh with each line: a token of a long answer costs no more than one of a short.
        line, shown = ([], "") if text.endswith("\n") else (line, text)


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
    if hasattr(model, "for_inference"):
        model.for_inference()  # Unsloth's switch: KV cache on, dropout off
    else:
        model.eval()
    ids, mask = padded(rows, tokenizer.pad_token_id, left=True)
    make_room(model, len(ids[0]) + options.get("max_new_tokens", 0))
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **options)


def check_batching(model: Any, tokenizer: Any, prompts: list[list[int]]) -> str:
    """Compare greedy decoding of a few prompts (token ids) of different length in one batch and alone.

    Returns a sentence with the figures, or '' when all have one length and nothing is padded. On a CPU it is computed
    in float32. Raises GateError when the logits differ by more than rounding can make of them.
    """
    rows = _some(prompts)
    if len({len(ids) for ids in rows}) < 2:
        return ""
    with in_float32(model) as precision:
        together = _decode(model, tokenizer, rows)
        gaps = [_gap(_decode(model, tokenizer, [ids])[0], both) for ids, both in zip(rows, together, strict=True)]
    worst = float(torch.tensor(gaps).max())  # not a number if any is, and then it passes no comparison
    allowed = ALLOWED_FLOAT32 if precision == "float32" else ALLOWED_16BIT
    lengths = ", ".join(str(len(ids)) for ids in rows)
    if not worst <= allowed:
        raise GateError(f"prompts of {lengths} tokens get other answers in a batch than alone: log probabilities "
                        f"differ by {worst:.2g} nats in {precision}, allowed {allowed:g}; padding reaches the model",
                        "answer one at a time: --batch-size 1")
    return (f"in a batch as one at a time: {len(rows)} prompts of {lengths} tokens, log probabilities differ by at "
            f"most {worst:.2g} nats in {precision} (allowed {allowed:g})")


def _some(prompts: list[list[int]]) -> list[list[int]]:
    """A few prompts from the shortest to the longest."""
    order = sorted(prompts, key=len)
    order = [ids for ids in order if len(ids) <= LONGEST] or order[:2]
    places = sorted({round(i * (len(order) - 1) / (ROWS - 1)) for i in range(ROWS)})
    return [order[place] for place in places]


def _decode(model: Any, tokenizer: Any, rows: list[list[int]]) -> list[tuple[list[int], Any]]:
    """For each row its greedy tokens and, at each step, all log probabilities (steps, vocabulary)."""
    out = generate(model, tokenizer, rows, max_new_tokens=STEPS, do_sample=False, temperature=None, top_p=None,
                   top_k=None, output_logits=True, return_dict_in_generate=True)
    logprobs = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    tokens = out.sequences[:, -logprobs.shape[1]:].tolist()
    return list(zip(tokens, logprobs, strict=True))


def _gap(alone: tuple[list[int], Any], together: tuple[list[int], Any]) -> float:
    """The largest difference of the likeliest tokens' log probabilities, up to the first token that differs."""
    pairs = enumerate(zip(alone[0], together[0], strict=True), 1)
    steps = next((step for step, (a, b) in pairs if a != b), len(alone[0]))
    top = alone[1][:steps].topk(TOP).indices
    return float((alone[1][:steps].gather(-1, top) - together[1][:steps].gather(-1, top)).abs().max())

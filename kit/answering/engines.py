"""What answers, and how: a question, streamed; the rows of a file.

What it is, kit.answering.choosing says. torch is imported only where a model in memory answers.
"""

import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kit.answering.choosing import Engine
from kit.answering.journal import Answer
from kit.answering.replies import gguf_sampling
from kit.common.errors import GateError, KitError
from kit.data.shapes import longest_user_turn
from kit.gguf.child import LlamaChild
from kit.gguf.formats import control_tokens as gguf_control_tokens
from kit.gguf.formats import read_header
from kit.models.template import Message, any_of, control_tokens, prompt_ids, template_kwargs, typed, with_system
from kit.recipe.recipe import Recipe


def answers(selected: Engine) -> Callable[[list[Message]], Iterator[str]]:
    """A function that streams the answer to a conversation; the model is loaded once."""
    model, tokenizer = (selected.path, None) if selected.name == "gguf" else selected.load()
    control = _control(model if tokenizer is None else tokenizer)

    def answer(messages: list[Message]) -> Iterator[str]:
        if tokens := typed(messages[-1:], control):
            print(f"note: {said_of(tokens)}", file=sys.stderr)
        return stream(model, tokenizer, messages, selected.recipe)

    return answer


def _control(vocabulary: Any) -> re.Pattern[str]:
    """The control tokens of a tokenizer, or of the GGUF at a path."""
    return any_of(gguf_control_tokens(read_header(vocabulary)) if isinstance(vocabulary, Path) else
                  control_tokens(vocabulary))


def said_of(tokens: list[str]) -> str:
    """What is said of a question in which control tokens are typed; `kit lint` refuses such a row."""
    return f"the question holds {', '.join(map(repr, dict.fromkeys(tokens)))}, which the model takes for its own"


def stream(model: Any, tokenizer: Any, prompt: str | list[Message], recipe: Recipe | None = None) -> Iterator[str]:
    """The answer token by token. `model` is a model in memory, or the path of a GGUF file (tokenizer None).

    `prompt` is a question or a list of messages; the recipe brings template settings and sampling.
    """
    recipe = recipe or Recipe.load({})
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(model, (str, Path)):
        with opened(model, recipe) as child:
            yield from child.stream(with_system(messages, recipe), **gguf_sampling(recipe))
    else:
        from kit.answering.in_memory import stream_in_memory

        yield from stream_in_memory(model, tokenizer, messages, recipe)


def opened(gguf: str | Path, recipe: Recipe) -> LlamaChild:
    """llama.cpp in a process of its own, with the recipe's context and template settings; a context manager."""
    return LlamaChild(Path(gguf), n_ctx=recipe.num_ctx or recipe.max_seq_length,
                      template_kwargs=template_kwargs(recipe))


class Prompt(NamedTuple):
    """A question as the model gets it; `cut` is how many tokens of it were left out.

    `typed` are the control tokens that stand in it as text: the tokenizer makes real ones of them.
    """

    messages: list[Message]
    ids: list[int]
    cut: int
    typed: tuple[str, ...] = ()


class InMemory:
    """A model in memory; answers a batch at once."""

    def __init__(self, engine: Engine) -> None:
        self.recipe = engine.recipe
        self.model, self.tokenizer = engine.load()
        self.control = _control(self.tokenizer)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.room = _room(self.recipe, positions, f"{self.recipe.model_name} has")

    def ids(self, messages: list[Message]) -> list[int]:
        return prompt_ids(self.tokenizer, messages, self.recipe)

    def answer(self, prompts: list[Prompt], seed: int) -> list[Answer]:
        import torch

        from kit.answering.in_memory import answer_batch

        torch.manual_seed(seed)
        replies = answer_batch(self.model, self.tokenizer, [prompt.ids for prompt in prompts], self.recipe)
        return [Answer(reply.text, reply.stopped, len(reply.ids)) for reply in replies]

    def prove(self, prompts: list[Prompt]) -> str:
        from kit.answering.in_memory import check_batching

        return check_batching(self.model, self.tokenizer, [prompt.ids for prompt in prompts])

    def close(self) -> None:
        from kit.models.load import free_memory

        del self.model
        free_memory()


class LlamaCpp:
    """A GGUF in llama.cpp; answers one row at a time."""

    def __init__(self, engine: Engine) -> None:
        assert engine.path is not None
        self.path, self.recipe = engine.path, engine.recipe
        self.control = _control(self.path)
        self.room = _room(self.recipe, self.recipe.num_ctx, "num_ctx is")
        self._open()

    def _open(self) -> None:
        self.child = LlamaChild(self.path, n_ctx=self.recipe.num_ctx or self.room + self.recipe.max_new_tokens,
                                template_kwargs=template_kwargs(self.recipe)).__enter__()

    def ids(self, messages: list[Message]) -> list[int]:
        with self._reopened():
            return self.child.prompt_ids(with_system(messages, self.recipe))

    def answer(self, prompts: list[Prompt], seed: int) -> list[Answer]:
        [prompt] = prompts
        with self._reopened():
            text = "".join(self.child.stream(with_system(prompt.messages, self.recipe), seed=seed,
                                             **gguf_sampling(self.recipe)))
            return [Answer(text, self.child.finish_reason == "stop", len(self.child.tokenize(text, special=False)))]

    @contextmanager
    def _reopened(self) -> Iterator[None]:
        """An error ends the child; the next row needs a new one."""
        try:
            yield
        except GateError:
            self._open()
            raise

    def close(self) -> None:
        self.child.close()


def _room(recipe: Recipe, positions: int | None, whose: str) -> int:
    """Tokens a prompt may have: max_input_length, or what the answer leaves of the model's positions."""
    wanted = recipe.max_input_length or recipe.max_seq_length
    left = wanted if positions is None else positions - recipe.max_new_tokens
    if left < 8:
        raise KitError(f"max_new_tokens: {recipe.max_new_tokens} leaves no room for a question: {whose} {positions}",
                       "lower max_new_tokens")
    if left < wanted:
        print(f"prompts may have {left:,} tokens, not {wanted:,}: {whose} {positions:,} positions, of which "
              f"max_new_tokens takes {recipe.max_new_tokens:,}")
    return min(wanted, left)


def fitted(model: InMemory | LlamaCpp, messages: list[Message]) -> Prompt:
    """The prompt, with the middle of its longest user turn left out where it has more tokens than `model.room`.

    Raises KitError where it does not fit with two letters of that turn either.
    """
    ids, tokens = model.ids(messages), tuple(typed(messages, model.control))
    if len(ids) <= model.room:
        return Prompt(messages, ids, 0, tokens)
    text, with_ends = longest_user_turn(messages)
    # Characters kept on each side; llama.cpp's tokens can't be put together here.
    keep = bisect_right(range(1, len(text) // 2), model.room,
                        key=lambda kept: len(model.ids(with_ends(text[:kept], text[-kept:]))))
    if not keep:
        raise KitError(f"the prompt has {len(ids):,} tokens where {model.room:,} fit, and no user turn long enough to "
                       "be shortened")
    shorter = with_ends(text[:keep], text[-keep:])
    shorter_ids = model.ids(shorter)
    return Prompt(shorter, shorter_ids, len(ids) - len(shorter_ids), tokens)

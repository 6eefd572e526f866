"""Answers, streamed or of a list of prompts, from a model in memory or from a GGUF file.

torch is imported only where a model in memory answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.answering.replies import Reply, gguf_sampling
from kit.common.show import bar
from kit.gguf.child import LlamaChild
from kit.models.template import Message, template_kwargs, with_system
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stream(model: Any, tokenizer: PreTrainedTokenizerBase | None, prompt: str | list[Message],
           recipe: Recipe | None = None) -> Iterator[str]:
    """The answer token by token. `model` is a model in memory, or the path of a GGUF file (tokenizer None).

    `prompt` is a question or a list of messages; the recipe brings template settings and sampling.
    """
    recipe = recipe or Recipe.load({})
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(model, (str, Path)):
        with _opened(Path(model), recipe) as child:
            yield from child.stream(with_system(messages, recipe), **gguf_sampling(recipe))
    else:
        from kit.answering.in_memory import stream_in_memory

        yield from stream_in_memory(model, tokenizer, messages, recipe)


def answer(model: Any, tokenizer: PreTrainedTokenizerBase | None, prompts: list[list[Message]],
           recipe: Recipe, batch_size: int = 20) -> list[Reply]:
    """Answers in the order of `prompts`, with a progress bar; a model in memory answers a batch of like length at once.

    `model` and `tokenizer` are those of `stream`.
    """
    if not isinstance(model, (str, Path)):
        from kit.answering.in_memory import answer_in_memory

        return answer_in_memory(model, tokenizer, prompts, recipe, batch_size)
    replies = []
    with _opened(Path(model), recipe) as child, \
            bar(len(prompts), f"answering with {child.gguf.name}", "row") as progress:
        for messages in prompts:
            text = "".join(child.stream(with_system(messages, recipe), **gguf_sampling(recipe)))
            replies.append(Reply(text, child.finish_reason == "stop"))
            progress.update()
    return replies


def _opened(path: Path, recipe: Recipe) -> LlamaChild:
    return LlamaChild(path, n_ctx=recipe.num_ctx or recipe.max_seq_length, template_kwargs=template_kwargs(recipe))

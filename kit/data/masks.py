"""Conversations to tokens and labels: which tokens are trained, proven for each row."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from kit.common.errors import KitError
from kit.data.segments import Located, Locator, Segment
from kit.gguf.messages import texts
from kit.models.template import Message, any_of, control_tokens, typed, with_system
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not trained (PyTorch's cross entropy)
UNUSED = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text has
PROCESS = os.getpid()
SHORT = 32  # characters; text this short is mostly the template's own and tokenised only once

Encoded = tuple[list[int], list[int]]  # input_ids and labels of a row
T = TypeVar("T")


class Formatter:
    """Conversations → token ids and labels. What is trained is found in the rendered text (`Locator`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self._short: dict[str, list[int]] = {}
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = any_of(control_tokens(tokenizer))
        # SentencePiece puts a space before every text, and some tokens take the space beside them along: then pieces
        # can't be joined, and whole texts are tokenised.
        twice = [token for ids in self._tokenize(["x", "x"]) for token in ids]
        self._joinable = tokenizer.decode(twice) == "xx" and not any(t.lstrip or t.rstrip for t in special)
        # Bytes of UTF-8 that may lack a token of their own: where one stands, its character is looked at.
        self._lost = bytes(byte for byte in range(256) if self._joinable and byte not in UNUSED
                           and not self._survives(_character_with(byte)))
        self._locator = Locator(tokenizer, recipe, self._control if self._joinable else re.compile(r"(?!)"))

    def locate(self, messages: list[Message]) -> Located:
        """Where the answers lie in the rendered conversation (the recipe's system prompt included).

        Raises KitError when the template refuses these turns, or changes a content so that the mask would be a guess.
        """
        messages = with_system(messages, self.recipe)
        if character := self.lost_character(messages):
            raise KitError(f"the tokenizer has no token for {character!r} (U+{ord(character):04X}): it would vanish",
                           "take the character out, or use another model")
        located = self._locator.locate(messages)
        if not self._joinable:
            self._encode_whole(located.segments)  # whether the edges can be told apart shows only in the tokens
        return located

    def typed(self, messages: list[Message]) -> list[str]:
        """Control tokens that stand in the contents as text: the tokenizer would make real ones of them."""
        return typed(messages, self._control)

    def lost_character(self, messages: list[Message]) -> str | None:
        """The first character that byte-level tokens can't spell, as some small vocabularies lack rare bytes."""
        for text in texts(messages) if self._lost else ():
            data = text.encode()
            if len(data.translate(None, self._lost)) < len(data):
                rare = {c for c in text if any(byte in self._lost for byte in c.encode())}
                if gone := next((c for c in sorted(rare) if not self._survives(c)), None):
                    return gone
        return None

    def _survives(self, character: str) -> bool:
        [ids] = self._tokenize([character])
        if ids and self.tokenizer.unk_token_id in ids:
            return True  # it does not vanish, but becomes the unknown token
        return self.tokenizer.decode(ids) in (character, unicodedata.normalize("NFC", character))

    def encode(self, conversations: list[list[Message]]) -> list[Encoded]:
        """(input_ids, labels) for each conversation; labels are -100 where nothing is trained."""
        return self.encode_located([self.locate(messages) for messages in conversations])

    def encode_located(self, rows: list[Located]) -> list[Encoded]:
        """The same for conversations that `locate` has been through."""
        if not self._joinable:
            return [self._encode_whole(row.segments) for row in rows]
        long = [text for row in rows for text, _ in row.segments if text not in self._short]
        encoded = dict(zip(long, self._tokenize(long), strict=True))
        self._short |= {text: ids for text, ids in encoded.items() if text in self._locator.heads
                        or (len(text) <= SHORT and len(self._short) < 10_000)}
        result = []
        for row in rows:
            ids: list[int] = []
            labels: list[int] = []
            for text, trained in row.segments:
                part = encoded[text] if text in encoded else self._short[text]
                ids += part
                labels += part if trained else [IGNORED] * len(part)
            result.append((ids, labels))
        return result

    def untrained(self, located: Located, labels: list[int]) -> str | None:
        """What of a row would not be learnt: "fully_masked", no token of an answer, or "stop_not_trained"."""
        if not self.recipe.train_on_responses_only:
            return None
        stops = labels.count(self.tokenizer.eos_token_id)
        if len(labels) - labels.count(IGNORED) <= stops:
            return "fully_masked"
        return "stop_not_trained" if stops < sum(segment.trained for segment in located.segments) else None

    def encode_ahead(self, batches: Iterable[tuple[T, list[Located]]]) -> Iterator[tuple[T, list[Encoded]]]:
        """Each batch with its tokens, in order; one is tokenised while the next is rendered."""
        with ThreadPoolExecutor(1) as pool:
            coming = ((batch, pool.submit(self.encode_located, located)) for batch, located in batches)
            before = next(coming, None)
            while before:
                after = next(coming, None)
                yield before[0], before[1].result()
                before = after

    def _encode_whole(self, segments: list[Segment]) -> Encoded:
        text = "".join(segment.text for segment in segments)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, labels = list(encoded["input_ids"]), []
        edges = [(0, False)]
        for trained, neighbours in groupby(segments, key=lambda segment: segment.trained):
            edges.append((edges[-1][0] + sum(len(segment.text) for segment in neighbours), trained))
        k = 1
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
            while k < len(edges) - 1 and start >= edges[k][0]:
                k += 1
            # A stop token may take the space behind it along (Phi-3's do); nothing else may reach over an edge.
            if end > edges[k][0] and not (edges[k][1] and text[edges[k][0]:end].isspace()):
                raise KitError(f"the token {self.tokenizer.decode([token])!r} holds the end of a prompt and the "
                               "beginning of an answer, so it can be neither trained nor left out",
                               "set prompt_style: chatml, or leave such rows out")
            labels.append(token if edges[k][1] else IGNORED)
        return ids, labels

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not texts:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        # Set only where something else left them on: they can't be changed while another thread tokenises.
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        with _all_cores():
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use every core here; elsewhere it may not, because processes are forked.

    In a forked one, a data loader's, the threads that it would wait for are not there.
    """
    if os.getpid() != PROCESS:
        yield
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _character_with(byte: int) -> str:
    """A character in whose UTF-8 form this byte stands."""
    behind = {0xE0: b"\xa0\x80", 0xF0: b"\x90\x80\x80"}.get(byte, b"\x80" * (1 + (byte > 0xDF) + (byte > 0xEF)))
    data = bytes([byte]) if byte < 0x80 else bytes([0xC2, byte]) if byte < 0xC0 else bytes([byte]) + behind
    return data.decode()

"""Response masks: which tokens of a conversation are trained, found by rendering and proven for each row."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kit.common.errors import KitError
from kit.models.template import CLOSE, Message, marked, pieces, render, with_system
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not trained (PyTorch's cross entropy)
UNUSED = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that no UTF-8 text has
SHORT = 32  # characters; text this short is mostly the template's own and tokenised only once

Encoded = tuple[list[int], list[int]]  # input_ids and labels of a row
T = TypeVar("T")


class Segment(NamedTuple):
    """A stretch of the rendered text; the trained ones are answers with their stop token."""

    text: str
    trained: bool


class Located(NamedTuple):
    """Segments whose texts joined are exactly what the template renders.

    Remarks: "history", the template writes an earlier answer in another way than the model is asked for it;
    "thinking_dropped", it leaves out the thinking of an earlier answer.
    """

    segments: list[Segment]
    remarks: frozenset[str]


class _Frame(NamedTuple):
    """What a template writes around the contents of one sequence of roles."""

    first: str  # before the first content
    after: list[str]  # behind content i, up to the next content
    asked: dict[int, str]  # answer i: what the model's prompt ends with, behind the content before the answer
    opening: dict[int, str]  # the same as the conversation has it, which for earlier answers may differ
    ending: dict[int, str]  # answer i: what ends it, the stop token with space before it
    plain: bool  # whether contents land in the text as they are, as far as markers can tell
    remarks: frozenset[str]


class Formatter:
    """Conversations → token ids and labels. Which tokens are trained is found by rendering, and proven for each row.

    Contents are replaced by markers to see where they land, and the prompt of each answer is rendered as at
    inference: what follows that prompt, up to and with the stop token, is trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.stop = str(tokenizer.eos_token)
        self._frames: dict[tuple[str, ...], _Frame] = {}
        self._short: dict[str, list[int]] = {}
        self._heads: dict[str, str] = {}
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        control = sorted((token.content for token in special), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        # SentencePiece puts a space before every text, and some tokens take the space beside them along: then pieces
        # can't be joined, and whole texts are tokenised.
        twice = [token for ids in self._tokenize(["x", "x"]) for token in ids]
        self._joinable = tokenizer.decode(twice) == "xx" and not any(t.lstrip or t.rstrip for t in special)
        self._lost = self._lost_bytes() if self._joinable else b""

    def locate(self, messages: list[Message]) -> Located:
        """Where the answers lie in the rendered conversation (the recipe's system prompt included).

        Raises KitError when the template refuses these turns, or changes a content so that the mask would be a guess.
        """
        messages = with_system(messages, self.recipe)
        if character := self.lost_character(messages):
            raise KitError(f"the tokenizer has no token for {character!r} (U+{ord(character):04X}): it would vanish",
                           "take the character out, or use another model")
        rendered = render(self.tokenizer, messages, self.recipe)
        roles = tuple(m["role"] for m in messages)
        if roles not in self._frames:
            self._frames[roles] = self._frame(messages)
        frame = self._frames[roles]
        segments, dropped = self._plainly(messages, frame, rendered), False
        if segments is None:
            segments, dropped = self._rewritten(messages, frame, rendered)
        remarks = frame.remarks | ({"thinking_dropped"} if dropped else set())
        if not self.recipe.train_on_responses_only:
            segments = [Segment(rendered, True)]
        elif self.recipe.last_response_only:
            last = max(k for k, segment in enumerate(segments) if segment.trained)
            before = "".join(text for text, _ in segments[:last])
            segments = [Segment(before, False), *segments[last:]]
        if not self._joinable:
            self._encode_whole(segments)  # whether the edges can be told apart shows only in the tokens
        return Located(segments, remarks)

    def _lost_bytes(self) -> bytes:
        """Bytes of UTF-8 that may lack a token of their own: where one stands, its character is looked at."""
        return bytes(byte for byte in range(256) if byte not in UNUSED and not self._survives(_character_with(byte)))

    def typed(self, messages: list[Message]) -> list[str]:
        """Control tokens that stand in the contents as text: the tokenizer would make real ones of them."""
        return [token for m in messages for token in self._control.findall(m["content"])]

    def lost_character(self, messages: list[Message]) -> str | None:
        """The first character that byte-level tokens can't spell, as some small vocabularies lack rare bytes."""
        if self._lost:
            for m in messages:
                data = m["content"].encode()
                if len(data.translate(None, self._lost)) < len(data):
                    rare = {c for c in m["content"] if any(byte in self._lost for byte in c.encode())}
                    if gone := [c for c in sorted(rare) if not self._survives(c)]:
                        return gone[0]
        return None

    def _survives(self, character: str) -> bool:
        [ids] = self._tokenize([character])
        if ids and self.tokenizer.unk_token_id in ids:
            return True  # it does not vanish, but becomes the unknown token
        return self.tokenizer.decode(ids) in (character, unicodedata.normalize("NFC", character))

    def _frame(self, messages: list[Message]) -> _Frame:
        turns = marked(messages)
        whole = render(self.tokenizer, turns, self.recipe)
        first, *after = pieces(whole, list(range(len(messages))))
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        asked, opening, ending, plain, remarks = {}, {}, {}, True, set()
        for i in answers:
            space = after[i][: len(after[i]) - len(after[i].lstrip())]
            if not after[i].startswith(space + self.stop):
                raise KitError(f"the chat template does not end every answer with {self.stop!r}",
                               "set prompt_style: chatml")
            ending[i] = space + self.stop
            prompt = render(self.tokenizer, turns[:i], self.recipe, add_generation_prompt=True)
            asked[i] = opening[i] = prompt.rpartition(CLOSE)[2]
            if not whole.startswith(prompt):
                if i == answers[-1]:
                    plain = False  # what the answer itself holds may decide: each row is looked at
                else:
                    opening[i] = after[i - 1]
                    remarks.add("history")
            elif self.stop in after[i - 1].removeprefix(opening[i]):
                raise KitError(f"the chat template writes the stop token {self.stop!r} into an answer, before its text",
                               "set prompt_style: chatml")
        return _Frame(first, after, asked, opening, ending, plain, frozenset(remarks))

    def _plainly(self, messages: list[Message], frame: _Frame, rendered: str) -> list[Segment] | None:
        """The segments when the template takes contents as they are, or all of them stripped; else None."""
        if not frame.plain:
            return None
        for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
            answers = {i: frame.after[i - 1].removeprefix(opening) + contents[i]
                       for i, opening in frame.opening.items()}
            segments = self._join(frame, contents, answers, frame.opening)
            if "".join(text for text, _ in segments) == rendered:
                return segments
        return None

    def _join(self, frame: _Frame, contents: list[str], answers: dict[int, str],
              opening: dict[int, str]) -> list[Segment]:
        """The segments, from all contents but the answers' and the answers as they are rendered."""
        head = self._head(frame.first)
        segments, plain = [Segment(head, False)], frame.first.removeprefix(head)
        for i, content in enumerate(contents):
            if i in answers:
                segments += [Segment(plain, False), Segment(answers[i] + frame.ending[i], True)]
                plain = frame.after[i].removeprefix(frame.ending[i])
            else:
                plain += content + (opening[i + 1] if i + 1 in answers else frame.after[i])
        return [segment for segment in (*segments, Segment(plain, False)) if segment.text]

    def _head(self, first: str) -> str:
        """The template's text up to its last control token before the first content: tokens never reach over that, so
        it is tokenised once for all rows."""
        if first not in self._heads:
            ends = [found.end() for found in self._control.finditer(first)] if self._joinable else []
            self._heads[first] = head = first[: ends[-1]] if ends else ""
            [self._short[head]] = self._tokenize([head])
        return self._heads[first]

    def _rewritten(self, messages: list[Message], frame: _Frame, rendered: str) -> tuple[list[Segment], bool]:
        """The segments when the template changes contents: trims them, or moves an answer's thinking.

        Also tells whether the thinking of an earlier answer is left out.
        """
        last = max(frame.opening)
        prompt = render(self.tokenizer, messages[:last], self.recipe, add_generation_prompt=True)
        if not rendered.startswith(prompt):
            raise KitError(f"the chat template asks for the last answer with {prompt[-60:]!r}, and its conversation "
                           "does not begin so: what is trained would not be what is asked",
                           "for an answer with thinking enable_thinking: true, without it false; or prompt_style: "
                           "chatml")
        others = [i for i in range(len(messages)) if i not in frame.opening]
        turns = [marker if i in others else m
                 for i, (m, marker) in enumerate(zip(messages, marked(messages), strict=True))]
        first, *chunks = pieces(render(self.tokenizer, turns, self.recipe), others)
        contents, answers, opening, dropped = [m["content"] for m in messages], {}, dict(frame.opening), False
        place = len(first)
        for i, chunk in zip(others, chunks, strict=True):
            text = messages[i]["content"]
            ways = (text, text.strip(), text.lstrip(), text.rstrip())
            contents[i] = next((way for way in ways if rendered.startswith(way + chunk, place)), "")
            if not contents[i] and not rendered.startswith(chunk, place):
                raise _rewrites(messages[i]["role"])
            place += len(contents[i]) + len(chunk)
            if i + 1 in opening:
                if chunk.startswith(frame.asked[i + 1]):
                    opening[i + 1] = frame.asked[i + 1]
                answers[i + 1], lost = self._answer(messages[i + 1]["content"], chunk, opening[i + 1],
                                                    frame.after[i + 1])
                dropped |= lost
        segments = self._join(frame, contents, answers, opening)
        if "".join(text for text, _ in segments) != rendered:
            raise _rewrites("assistant")
        return segments, dropped

    def _answer(self, content: str, chunk: str, opening: str, after: str) -> tuple[str, bool]:
        """One answer as it is rendered, out of the text between its neighbours; and whether its thinking is gone."""
        if not chunk.startswith(opening) or not chunk.endswith(after):
            raise _rewrites("assistant")
        body = chunk[len(opening):len(chunk) - len(after)]
        thinking, _, answer = content.rpartition("</think>")
        thought = thinking.rpartition("<think>")[2].strip()
        if not body.rstrip().endswith(answer.strip()) or self.stop in body.removesuffix(answer):
            raise _rewrites("assistant")
        return body, bool(thought) and thought not in body

    def encode(self, conversations: list[list[Message]]) -> list[Encoded]:
        """(input_ids, labels) for each conversation; labels are -100 where nothing is trained."""
        return self.encode_located([self.locate(messages) for messages in conversations])

    def encode_located(self, rows: list[Located]) -> list[Encoded]:
        """The same for conversations that `locate` has been through."""
        if not self._joinable:
            return [self._encode_whole(row.segments) for row in rows]
        long = [text for row in rows for text, _ in row.segments if text not in self._short]
        encoded = dict(zip(long, self._tokenize(long), strict=True))
        self._short |= {text: ids for text, ids in encoded.items() if len(text) <= SHORT and len(self._short) < 10_000}
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
            waiting: tuple[T, Future[list[Encoded]]] | None = None
            for batch, located in batches:
                coming = pool.submit(self.encode_located, located)
                if waiting:
                    yield waiting[0], waiting[1].result()
                waiting = (batch, coming)
            if waiting:
                yield waiting[0], waiting[1].result()

    def _encode_whole(self, segments: list[Segment]) -> Encoded:
        text = "".join(segment.text for segment in segments)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, labels = list(encoded["input_ids"]), []
        edges = [(0, False)]
        for segment in segments:
            end = edges[-1][0] + len(segment.text)
            if len(edges) > 1 and edges[-1][1] == segment.trained:
                edges.pop()
            edges.append((end, segment.trained))
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
    """Let the tokenizer use every core here; elsewhere it may not, because processes are forked."""
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


def _rewrites(role: str) -> KitError:
    return KitError(f"the chat template rewrites what the {role} said, so what is trained on can't be located",
                    "set prompt_style: chatml, or leave such rows out")

"""Where the answers lie in a rendered conversation, found by rendering and proven for each row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from kit.common.errors import KitError
from kit.data.tools import called, shown
from kit.models.template import CLOSE, OPEN, Message, marked, pieces, render
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NO_TOOLS = "prompt_style: chat with a model whose template has a place for tools; or take them out of the rows"


class Segment(NamedTuple):
    """A stretch of the rendered text; the trained ones are answers with their stop token."""

    text: str
    trained: bool


class ToolsNotShown(KitError):
    """The chat template leaves out a conversation's tools or calls."""


class Located(NamedTuple):
    """Segments whose texts joined are exactly what the template renders.

    Remarks: "history", the template writes an earlier answer in another way than the model is asked for it;
    "thinking_dropped", it leaves out the thinking of an earlier answer.
    """

    segments: list[Segment]
    remarks: frozenset[str]


class _Frame(NamedTuple):
    """What a template writes around the contents of one sequence of roles."""

    head: str  # up to its last control token before the first content: tokenised once for all rows
    first: str  # behind that, up to the first content
    after: list[str]  # behind content i, up to the next content
    asked: dict[int, str]  # answer i: what the model's prompt ends with, behind the content before the answer
    opening: dict[int, str]  # the same as the conversation has it, which for earlier answers may differ
    ending: dict[int, str]  # answer i: what ends it, the stop token with space before it
    plain: bool  # whether contents land in the text as they are, as far as markers can tell
    remarks: frozenset[str]
    calls: dict[int, str]  # answer i, which calls tools: what the template makes of it


class Locator:
    """Conversations → segments. What is trained is found by rendering.

    Contents are replaced by markers to see where they land, and the prompt of each answer is rendered as at
    inference: what follows that prompt, up to and with the stop token, is trained. `boundary` matches tokens that no
    other token reaches over.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, boundary: re.Pattern[str]) -> None:
        self.tokenizer, self.recipe, self.boundary = tokenizer, recipe, boundary
        self.stop = str(tokenizer.eos_token)
        self.heads: set[str] = set()  # those of all frames
        self._frames: dict[tuple[str, ...], _Frame] = {}

    def locate(self, messages: list[Message]) -> Located:
        """Where the answers lie. Raises KitError when the template refuses these turns, or changes a content so that
        the mask would be a guess."""
        rendered = render(self.tokenizer, messages, self.recipe)
        frame = self._frame_of(messages, rendered)
        contents = [frame.calls.get(i, m["content"]) for i, m in enumerate(messages)]
        segments, dropped = self._plainly(contents, frame, rendered), False
        if segments is None:
            segments, dropped = self._rewritten(messages, contents, frame, rendered)
        remarks = frame.remarks | ({"thinking_dropped"} if dropped else set())
        if not self.recipe.train_on_responses_only:
            segments = [Segment(rendered, True)]
        elif self.recipe.last_response_only:
            last = max(k for k, segment in enumerate(segments) if segment.trained)
            before = "".join(text for text, _ in segments[:last])
            segments = [Segment(before, False), *segments[last:]]
        return Located(segments, remarks)

    def _frame_of(self, messages: list[Message], rendered: str) -> _Frame:
        """Depends only on the roles, but for tools and calls: those differ from row to row."""
        if all(len(message) == 2 for message in messages):
            roles = tuple(m["role"] for m in messages)
            if roles not in self._frames:
                self._frames[roles] = self._frame(messages)
                self.heads.add(self._frames[roles].head)
            return self._frames[roles]
        if definitions := next(filter(None, (m.get("tools") for m in messages)), None):
            without = [{key: text for key, text in m.items() if key != "tools"} for m in messages]
            if not shown(definitions, rendered, render(self.tokenizer, without, self.recipe)):
                raise _no_place("tools: its conversations look the same without them")
        return self._frame(messages)

    def _frame(self, messages: list[Message]) -> _Frame:
        turns = marked(messages)
        whole = render(self.tokenizer, turns, self.recipe)
        first, *between = pieces(whole, [i for i, m in enumerate(messages) if not m.get("tool_calls")])
        after, calls = self._calls(messages, between)
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
        end = max((match.end() for match in self.boundary.finditer(first)), default=0)
        return _Frame(first[:end], first[end:], after, asked, opening, ending, plain, frozenset(remarks), calls)

    def _calls(self, messages: list[Message], between: list[str]) -> tuple[list[str], dict[int, str]]:
        """The text behind each message, out of that behind each one with a marker; and what a turn with calls is."""
        after: list[str] = []
        calls: dict[int, str] = {}
        for i, message in enumerate(messages):
            if not message.get("tool_calls"):
                after.append(between[len(after) - len(calls)])
                continue
            chunk = after[-1]
            opening = next((text for text in self._openings(messages, i) if chunk.startswith(text)), None)
            end = -1 if opening is None else chunk.find(self.stop, len(opening))
            if opening is None or end < 0:
                raise ToolsNotShown(f"the chat template does not write a call of tools as an answer that is asked for "
                                    f"and ends with {self.stop!r}", NO_TOOLS)
            calls[i] = chunk[len(opening):end]
            if not called(message["tool_calls"], calls[i]):
                raise _no_place(f"tool calls: of {json.dumps(json.loads(message['tool_calls'])[0])} it makes "
                                f"{calls[i][:80]!r}")
            after[-1:] = [opening, chunk[end:]]
        return after, calls

    def _openings(self, messages: list[Message], i: int) -> Iterator[str]:
        """What may stand before the calls of turn i: what asks for it, or what stands before a content there."""
        turns = marked(messages[:i])
        prompt = render(self.tokenizer, turns, self.recipe, add_generation_prompt=True)
        yield prompt.rpartition(CLOSE)[2]
        with suppress(KitError):  # a template may want calls before a result
            turns += [{"role": "assistant", "content": OPEN}, *marked(messages[i + 1:])]
            yield render(self.tokenizer, turns, self.recipe).partition(turns[i - 1]["content"])[2].partition(OPEN)[0]

    def _plainly(self, whole: list[str], frame: _Frame, rendered: str) -> list[Segment] | None:
        """The segments when the template takes contents as they are, or all of them stripped; else None."""
        if not frame.plain:
            return None
        for contents in (whole, [text.strip() for text in whole]):
            answers = {i: frame.after[i - 1].removeprefix(opening) + contents[i]
                       for i, opening in frame.opening.items()}
            segments = self._join(frame, contents, answers, frame.opening)
            if "".join(text for text, _ in segments) == rendered:
                return segments
        return None

    def _join(self, frame: _Frame, contents: list[str], answers: dict[int, str],
              opening: dict[int, str]) -> list[Segment]:
        """The segments, from all contents but the answers' and the answers as they are rendered."""
        segments, plain = [Segment(frame.head, False)], frame.first
        for i, content in enumerate(contents):
            if i in answers:
                segments += [Segment(plain, False), Segment(answers[i] + frame.ending[i], True)]
                plain = frame.after[i].removeprefix(frame.ending[i])
            else:
                plain += content + (opening[i + 1] if i + 1 in answers else frame.after[i])
        return [segment for segment in (*segments, Segment(plain, False)) if segment.text]

    def _rewritten(self, messages: list[Message], whole: list[str], frame: _Frame,
                   rendered: str) -> tuple[list[Segment], bool]:
        """The segments when the template changes contents, the `whole` of each: trims them, or moves its thinking.

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
        contents, answers, opening, dropped = list(whole), {}, dict(frame.opening), False
        place = len(first)
        for i, chunk in zip(others, chunks, strict=True):
            text = messages[i]["content"]
            ways = (text, text.strip(), text.lstrip(), text.rstrip(), json.dumps(text, ensure_ascii=False)[1:-1])
            contents[i] = next((way for way in ways if rendered.startswith(way + chunk, place)), "")
            if not contents[i] and not rendered.startswith(chunk, place):
                raise _rewrites(messages[i]["role"])
            place += len(contents[i]) + len(chunk)
            if i + 1 in opening:
                if chunk.startswith(frame.asked[i + 1]):
                    opening[i + 1] = frame.asked[i + 1]
                answers[i + 1], lost = self._answer(whole[i + 1], chunk, opening[i + 1], frame.after[i + 1])
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


def _no_place(what: str) -> KitError:
    return ToolsNotShown(f"the chat template has no place for {what}", NO_TOOLS)


def _rewrites(role: str) -> KitError:
    return KitError(f"the chat template rewrites what the {role} said, so what is trained on can't be located",
                    "set prompt_style: chatml, or leave such rows out")

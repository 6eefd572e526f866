"""Where the answers lie in a rendered conversation, found by rendering and proven for each row."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kit.common.errors import KitError
from kit.models.template import CLOSE, Message, marked, pieces, render
from kit.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    head: str  # up to its last control token before the first content: tokenised once for all rows
    first: str  # behind that, up to the first content
    after: list[str]  # behind content i, up to the next content
    asked: dict[int, str]  # answer i: what the model's prompt ends with, behind the content before the answer
    opening: dict[int, str]  # the same as the conversation has it, which for earlier answers may differ
    ending: dict[int, str]  # answer i: what ends it, the stop token with space before it
    plain: bool  # whether contents land in the text as they are, as far as markers can tell
    remarks: frozenset[str]


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
        return Located(segments, remarks)

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
        end = max((match.end() for match in self.boundary.finditer(first)), default=0)
        self.heads.add(first[:end])
        return _Frame(first[:end], first[end:], after, asked, opening, ending, plain, frozenset(remarks))

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
        segments, plain = [Segment(frame.head, False)], frame.first
        for i, content in enumerate(contents):
            if i in answers:
                segments += [Segment(plain, False), Segment(answers[i] + frame.ending[i], True)]
                plain = frame.after[i].removeprefix(frame.ending[i])
            else:
                plain += content + (opening[i + 1] if i + 1 in answers else frame.after[i])
        return [segment for segment in (*segments, Segment(plain, False)) if segment.text]

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


def _rewrites(role: str) -> KitError:
    return KitError(f"the chat template rewrites what the {role} said, so what is trained on can't be located",
                    "set prompt_style: chatml, or leave such rows out")

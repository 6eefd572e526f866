"""The data check's findings: code, severity, what it means, what to do about it; and the checks of a text."""

import re
import unicodedata
from typing import Any

from kit.data.rows import Place
from kit.data.shapes import Fault
from kit.data.workbooks import SAVE_VALUES

SHOWN = 100  # places kept of each finding

# code: (severity, what it means, remedy). An error is a row that would not be trained, or not as meant, or must not be.
FINDINGS = {
    "invalid_json": ("error", "not JSON", "correct it; each row is one complete JSON object"),
    "torn_line": ("error", "the last line is cut off", "write the file again, or leave the line out with --fix"),
    "wrong_encoding": ("error", "not UTF-8", "save the file as UTF-8; a line or a few among others: write them again"),
    "ragged_row": ("error", "cells and columns don't match", "quote cells that hold the delimiter or a line break"),
    "unsaved_formula": ("error", "a formula whose value is not stored in the file", SAVE_VALUES),
    "not_an_object": ("error", "a row that is no object", "each row is an object with named fields"),
    "missing_field": ("error", "a field is missing",
                      "add it, or name its column: 'columns={prompt: 问题, completion: 答案}'"),
    "misnamed_field": ("error", "a field is nearly named right",
                       "rename it (--fix does), or correct the recipe's columns"),
    "untrained_column": ("error", "a column that changes what the row means is not trained",
                         "write what belongs to the prompt into its text, or take the column out if the row is "
                         "meant without it"),
    "preferences": ("error", "preference data, which trains by comparison (DPO): this trains on single answers (SFT)",
                    "keep the better answer alone, as prompt and completion or as messages"),
    "not_text": ("error", "a value is no text", "write it as text; --fix does so for numbers"),
    "mixed_shapes": ("error", "one file mixes shapes", "put each shape into a file of its own"),
    "wrong_role": ("error", "an unknown role", "use system, user, assistant or tool, or say what they are called: "
                   "'columns={user: 客户, assistant: 客服}'; --fix renames near misses"),
    "first_turn": ("error", "the first turn is not the user's", "begin with the user, after an optional system turn"),
    "role_order": ("error", "turns don't alternate", "user and assistant in turn, the assistant last"),
    "no_assistant": ("error", "no answer to learn from", "add the assistant's turn, or leave the row out"),
    "empty_response": ("error", "the answer is empty", "write the answer, or leave the row out with --fix"),
    "empty_prompt": ("error", "the prompt is empty", "write the prompt, or leave the row out with --fix"),
    "special_token": ("error", "a control token typed as text becomes a real one",
                      "take it out, or write it in another way, such as with a space inside"),
    "lost_character": ("error", "a character that the tokenizer has no token for: it would vanish",
                       "take it out, or choose another model"),
    "secret": ("error", "what looks like a token or key: a model can repeat what it learnt",
               "revoke it if it is one, and write a placeholder in its place, or leave the row out with --fix"),
    "template_refused": ("error", "the chat template can't take this row", "change its roles or contents, or set "
                         "another prompt_style"),
    "tools_not_shown": ("error", "the chat template has no place for tools", "prompt_style: chat with a model whose "
                        "template has one (Qwen2.5, Qwen3, Llama 3.1, Mistral); or take the tools out: a call in text "
                        "is trained as text"),
    "fully_masked": ("error", "no token of the answer is trained", "look at the row: its text is lost in tokenising"),
    "stop_not_trained": ("error", "the stop token is not trained: the model would not learn to stop",
                         "the tokenizer must know the template's stop token as one special token"),
    "heldout_overlap": ("error", "held-out rows ask what is trained on",
                        "take them out of one file, or set eval_overlap: drop"),
    "too_long": ("warning", "longer than max_seq_length: the row, with its answer, is left out",
                 "raise max_seq_length, or set overlong_rows: truncate_prompt"),
    "prompt_cut": ("warning", "longer than max_seq_length: the prompt is shortened", "raise max_seq_length"),
    "duplicate": ("warning", "the same prompt and answer again", "keep one; --fix does"),
    "conflict": ("warning", "the same prompt with another answer", "decide on one, unless variety is meant"),
    "history": ("warning", "the template writes earlier answers in another way than the model is asked for them",
                "set last_response_only: true, or enable_thinking as at inference"),
    "thinking_dropped": ("warning", "the template leaves out the thinking of earlier answers",
                         "set last_response_only: true, or make a row of each answer"),
    "mixed_thinking": ("warning", "answers with and without thinking", "separate them, or mark which is which"),
    "placeholder": ("warning", "a placeholder that nothing was put into",
                    "put the text in its place, or leave the row out, unless the model is meant to write it so"),
    "other_assistant": ("warning", "a system prompt that names another maker's assistant",
                        "name your own, or none: the model would say that it is that one"),
    "control_character": ("warning", "control characters", "remove them; --fix does"),
    "mojibake": ("warning", "text decoded with the wrong encoding", "read the source again with its real encoding"),
    "not_normalised": ("warning", "characters composed otherwise than usual (not NFC)", "normalise; --fix does"),
    "unknown_token": ("warning", "text that the tokenizer does not know", "remove it, or choose another model"),
    "personal_address": ("warning", "an e-mail address that may be a person's",
                         "remove it if it is: a model can repeat what it learnt"),
    "near_duplicate": ("info", "nearly the same as another row", "keep one, unless variety is meant"),
    "outlier": ("info", "far longer than the others", "look at it: is it one row?"),
}


class Findings:
    """Findings by code; `severities` are those that the recipe changes. `bad_rows`: {file: rows with an error}, all."""

    def __init__(self, severities: dict[str, str]) -> None:
        self._severities = severities
        self._by_code: dict[str, dict[str, Any]] = {}
        self.bad_rows: dict[str, set[int]] = {}

    def add(self, fault: Fault, place: Place) -> None:
        """One more row with this fault."""
        if fault.code not in self._by_code:
            severity, message, remedy = FINDINGS[fault.code]
            self._by_code[fault.code] = {"code": fault.code, "severity": self._severities.get(fault.code, severity),
                                         "count": 0, "message": message, "remedy": remedy, "places": []}
        finding = self._by_code[fault.code]
        finding["count"] += 1
        if finding["severity"] == "error":
            self.bad_rows.setdefault(place.file, set()).add(place.row)
        if len(finding["places"]) < SHOWN:
            finding["places"].append({**place._asdict(), "detail": fault.message})

    def all(self) -> list[dict[str, Any]]:
        """Errors first, then warnings, then remarks; each in the order of FINDINGS."""
        order, levels = list(FINDINGS), ("error", "warning", "info")
        return sorted(self._by_code.values(), key=lambda f: (levels.index(f["severity"]), order.index(f["code"])))


# C0 but tab and newline, DEL, C1, byte order marks inside a text, and the marks that turn its direction around.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\u202a-\u202e\u2066-\u2069]")

# UTF-8 read as Windows-1252: a lead byte's character followed by those of continuation bytes.
_CP1252 = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0xC0))
_MOJIBAKE = re.compile(f"[\u00c2-\u00f4][{re.escape(_CP1252)}]{{1,3}}")
# What such a pair must mean to count: accented Latin letters, dashes and quotes, Chinese, Japanese, full-width forms.
_PLAUSIBLE = re.compile("[\u00a0-\u017f\u2010-\u203a\u20ac\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
# An accented letter before French quotes or a dash is text as people write it.
_TYPOGRAPHY = set("\u00a0«»‹›–—…‘’“”‚„")
_TORN = re.compile("\ufffd|锟斤拷|烫烫烫")


def control_characters(text: str) -> str | None:
    """The first control character, as U+001B."""
    if text.isprintable():
        return None
    match = CONTROL.search(text)
    return f"U+{ord(match[0]):04X}" if match else None


def mojibake(text: str) -> str | None:
    """A piece of text that was decoded with the wrong encoding, and what it should have been."""
    if text.isascii():
        return None
    if match := _TORN.search(text):
        return f"{match[0]!r}, characters lost in a conversion"
    for match in _MOJIBAKE.finditer(text):
        try:
            meant = bytes([ord(match[0][0]), *(0x80 + _CP1252.index(c) for c in match[0][1:])]).decode()
        except UnicodeDecodeError:
            continue
        if _PLAUSIBLE.match(meant) and not (len(match[0]) > 2 and _TYPOGRAPHY.issuperset(match[0][1:])):
            return f"{match[0]!r} should be {meant!r}"
    return None


def not_normalised(text: str) -> bool:
    """Whether characters are composed otherwise than in NFC: tokenizers that normalise see another text."""
    return not text.isascii() and not unicodedata.is_normalized("NFC", text)

"""Values of other tools in the words of our fields, and in a comment."""

import json
import re
from contextlib import suppress
from typing import Any

from kit.recipe.fields import ALL_LINEAR, ALL_LINEAR_TOO, Fields

SHORT = 60  # characters of a value in a comment
FORMATS = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
STYLES = {"alpaca": "alpaca", "chatml": "chatml"}  # all others are the model's own
CHECKPOINTING = {"true": True, "false": False, "unsloth": "unsloth", "offload": "unsloth"}
NUMBERS = (float, float | None)


def normal(name: str, value: Any) -> Any:
    """A value in the words of our field; None for "chosen by itself"."""
    if isinstance(value, str) and value.strip().lower() in ("none", "null", "auto", ""):
        return "none" if name in ("report_to", "save_merged", "bias") else None
    if name in ("dtype", "bnb_4bit_compute_dtype"):
        word = str(value).removeprefix("torch.").lower()
        return FORMATS.get(word, word)
    if name == "target_modules" and isinstance(value, (str, list)):
        words = value if isinstance(value, list) else re.split(r"[,\s]+", value.strip())
        every = ALL_LINEAR_TOO & {str(word).lower() for word in words}
        return [ALL_LINEAR] if every else words
    if name == "prompt_style":
        return STYLES.get(str(value).lower(), "chat")
    if name == "use_gradient_checkpointing" and isinstance(value, str):
        return CHECKPOINTING.get(value.lower(), True)
    if name in ("fp16", "bf16"):
        return True if value is True else None  # neither there is float32; here by the machine
    if name == "resume_from_checkpoint":
        return value if isinstance(value, bool) else None
    if name == "adapter_name_or_path" and isinstance(value, list):
        return value[0] if len(value) == 1 else value
    if isinstance(value, str) and Fields.model_fields[name].annotation in NUMBERS:
        with suppress(ValueError):
            return float(value)
    if name == "columns" and isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
    return value


def short(value: Any) -> str:
    """A value in a comment: one line, not too long, nothing that could end the comment."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = printed(text)
    return text if len(text) <= SHORT else text[:SHORT] + "…"


def printed(text: str) -> str:
    """A text on one line, with nothing in it that is not printed."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())

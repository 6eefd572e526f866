"""What looks like a secret in a text, and what only stands for one; and what looks like a person's e-mail address.

The data check, the gate of a finished run and the report all ask here, so that they can't disagree.
"""

import base64
import re

# A word boundary would take a Chinese character for a letter of the word, and the n of JSON's \n too.
_START, _END = r"(?:(?<![A-Za-z0-9_])|(?<=\\[nrt]))", r"(?![A-Za-z0-9_])"
# The group is the part that tells a secret from a placeholder: behind the prefix, of a private key its first full line.
SECRETS = {kind: re.compile(pattern) for kind, pattern in {
    # The line follows its heading in the same text: brackets are between two texts of a page or a notebook.
    "private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----(?:(?!-----)[^\[{<]){0,200}?([A-Za-z0-9+/=]{60,})"
                   r"(?:(?!-----)[\s\S])*",
    "AWS key": rf"{_START}AKIA([0-9A-Z]{{16}}){_END}",
    "GitHub token": rf"{_START}(?:gh[pousr]_([A-Za-z0-9]{{36,}})|github_pat_([A-Za-z0-9_]{{40,}}))",
    "Hugging Face token": rf"{_START}hf_([A-Za-z0-9]{{30,}}){_END}",
    "API key": rf"{_START}sk-([A-Za-z0-9_-]{{20,}})",
    # In a picture's base64, where these letters may come by chance, more of it follows.
    "Google key": rf"{_START}AIza([0-9A-Za-z_-]{{35}})(?![0-9A-Za-z_+/=-])",
    "Slack token": rf"{_START}xox[abprs]-([A-Za-z0-9-]{{10,}})",
    "signed token": rf"{_START}eyJ[A-Za-z0-9_-]{{10,}}\.(eyJ[A-Za-z0-9_-]{{10,}})\.[A-Za-z0-9_-]{{10,}}",
}.items()}
# No address: git@host, logo@2x.png, a matrix product q@k.mean(), and the domains for examples (RFC 2606).
ADDRESS = re.compile(
    r"(?<![\w.+-])(?!git@)[\w.+-]+@(?!test\.|localhost)(?!\dx\.)(?!(?:[\w-]+\.)*example\.)"
    r"(?!(?:[\w-]+\.)+(?:example|test|invalid|localhost)\b)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b(?!\()")
# A search for these is ten times as fast as the expressions, which most texts then never meet.
_HINTS = ("sk-", "eyJ", "hf_", "AKIA", "AIza", "xox", "PRIVATE KEY", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
          "github_pat_")
# What people write where a secret would stand; the last is the one of GitHub's documentation.
_WORDS = re.compile(r"example|your|placeholder|dummy|1234567|abcdefg|john ?doe|16c7e42f292c6912e7710c838347ae178b4a",
                    re.IGNORECASE)
_REPEATED = re.compile(r"(.)\1{5}")
DISTINCT = 4  # different characters that a secret has at least
MIXED = 16  # characters of an API key in parts (between hyphens) that hold letters and digits, at least


def secret(text: str) -> str | None:
    """What kind of secret a text seems to hold, with its first four letters only; None without any."""
    if any(hint in text for hint in _HINTS):
        for kind, pattern in SECRETS.items():
            for match in pattern.finditer(text):
                if _is_one(kind, match):
                    return f"{kind} {match[0][:4]}…"
    return None


def redacted(text: str) -> str:
    """The text with the kind of each secret in its place."""
    if any(hint in text for hint in _HINTS):
        for kind, pattern in SECRETS.items():
            for match in reversed(list(pattern.finditer(text))):  # from the end: places before stay what they are
                if _is_one(kind, match):
                    text = f"{text[:match.start()]}[{kind}]{text[match.end():]}"
    return text


def address(text: str) -> str | None:
    """The beginning of an e-mail address that may be a person's; None without any."""
    match = ADDRESS.search(text) if "@" in text else None
    return f"{match[0][:4]}…" if match else None


def _is_one(kind: str, match: re.Match[str]) -> bool:
    """Whether it is no placeholder: a secret is random, and a placeholder is words, or one character many times."""
    text = match[match.lastindex or 0]
    if kind == "signed token":  # who it is for can be read: its middle is JSON, in base64
        readable = base64.urlsafe_b64decode(text[: len(text) // 4 * 4])
        return not _WORDS.search(readable.decode("utf-8", "replace"))
    if kind == "private key":  # long enough to hold any of these by chance
        return _kinds(text) > 1
    if _WORDS.search(text) or _REPEATED.search(text) or len(set(text)) < DISTINCT:
        return False
    if kind == "API key":  # the letters before it are common: words joined by hyphens are no key
        parts = [part for part in re.split("[-_]", text) if not part.isalpha() and not part.isdecimal()]
        return sum(map(len, parts)) >= MIXED
    return kind == "AWS key" or _kinds(text) > 1  # one AWS key in thirty has no digit


def _kinds(text: str) -> int:
    """How many of small letters, capitals and digits stand in it."""
    return sum(bool(re.search(kind, text)) for kind in ("[a-z]", "[A-Z]", "[0-9]"))

"""What looks like a secret in a text."""

import re

SECRETS = {
    "private key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"),
    "AWS key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "Google key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "signed token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    # No address: git@host, logo@2x.png, a matrix product q@k.mean(), and the domains for examples (RFC 2606).
    "e-mail address": re.compile(
        r"(?<![\w.+-])(?!git@)[\w.+-]+@(?!test\.|localhost)(?!\dx\.)(?!(?:[\w-]+\.)*example\.)"
        r"(?!(?:[\w-]+\.)+(?:example|test|invalid|localhost)\b)[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b(?!\()"),
}
# A search for these is ten times as fast as the expressions, which most texts then never meet.
_HINTS = ("@", "sk-", "eyJ", "hf_", "AKIA", "AIza", "xox", "PRIVATE KEY", "ghp_", "gho_", "ghu_", "ghs_", "ghr_",
          "github_pat_")


def secret(text: str, addresses: bool = True) -> str | None:
    """What kind of secret a text seems to hold, with its beginning only; `addresses` counts e-mail addresses too."""
    if not any(hint in text for hint in _HINTS):
        return None
    for kind, pattern in SECRETS.items():
        if (addresses or kind != "e-mail address") and (match := pattern.search(text)):
            return f"{kind} {match[0][:4]}…"
    return None

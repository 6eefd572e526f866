"""Writes the pages of docs/ that are made from the code: `make docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kit.data.findings import FINDINGS
from kit.recipe.fields import AFFECTS
from kit.recipe.recipe import Recipe

DOCS = Path(__file__).parent
SCHEMA = Recipe.model_json_schema()["properties"]


def recipe_page() -> str:
    """recipe.md: a table of every field."""
    rows = ["# Recipe fields", "", "Made by `make docs` from `kit/recipe/fields.py`.", "",
            "What a field affects:", "", *(f"- `{word}`: {meaning}" for word, meaning in AFFECTS.items()), "",
            "| field | default | bounds | unit | affects | what it does |", "|---|---|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        unit, affects = (SCHEMA[name][word] for word in ("unit", "affects"))
        rows.append(f"| `{name}` | `{plain(field.default)}` | {bounds(name)} | {unit} | {affects} | "
                    f"{field.description} |")
    return "\n".join(rows) + "\n"


def plain(value: Any) -> str:
    """A value as a recipe would state it."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def bounds(name: str) -> str:
    """'≥ 1; ≤ 4096', or the values a field can have."""
    schema = SCHEMA[name]
    parts = [schema, *schema.get("anyOf", [])]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for part in parts for key, sign in signs.items() if key in part]
    limits += [", ".join(str(v) for v in part["enum"]) for part in parts if "enum" in part]
    return "; ".join(limits)


def findings_page() -> str:
    """findings.md: every finding of the data check."""
    rows = ["# What the data check finds", "", "Made by `make docs` from `kit/data/findings.py`. An error is a row "
            "that would not be trained, or not as it is meant, or must not be; a warning is for you to judge.", "",
            "| finding | severity | what it means | what to do |", "|---|---|---|---|"]
    rows += [f"| `{code}` | {severity} | {meaning} | {remedy} |"
             for code, (severity, meaning, remedy) in FINDINGS.items()]
    return "\n".join(rows) + "\n"


PAGES = {"recipe.md": recipe_page, "findings.md": findings_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")

"""Writes the pages of docs/ that are made from the code: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from kit.data.findings import FINDINGS
from kit.recipe.fields import AFFECTS
from kit.recipe.recipe import Recipe

DOCS = Path(__file__).parent
SOUND, FAULTY = ("f16", "q8_0", "q5_k_m", "q4_k_m"), ("f16", "q8_0", "q4_k_m")
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


def gates_page() -> str:
    """gates-measured.md: both error rates of the gates after training."""
    result = json.loads((DOCS.parent / "benchmarks" / "results" / "gates.json").read_text(encoding="utf-8"))
    trainings = result["trainings"]
    drawn = [counts for each in trainings.values() for one in each["sound"].values()
             for counts in one["failed_draws"].values()]
    draws, failed = result["draws"] * len(drawn), sum(sum(counts.values()) for counts in drawn)
    rows = ["# What the gates find, and what they don't", "", "Made by `make docs` from what `benchmarks/gates.py` "
            "measured. A training is named by model, rows and optimiser steps.", "", "## Sound exports", "",
            f"In {draws:,} draws of 4, 8 and 32 conversations a gate failed {failed} times. Spread is that of the "
            "logits by what is allowed; above 1 the gate fails.", "",
            f"| training | verdict | {' | '.join(SOUND)} |", f"|---|---|{'---|' * len(SOUND)}"]
    for name, each in sorted(trainings.items()):
        spreads = (each["sound"][kind]["spread"] / each["sound"][kind]["allowed"] for kind in SOUND)
        rows.append(f"| {name} | {each['verdict']} | {' | '.join(f'{spread:.2f}' for spread in spreads)} |")
    rows += ["", "## Faults", "", "In how many of the trainings the fault is found in the file made of it; behind it, "
             "how many of the compared answers of the others differ from the trained model's.", "",
             f"| fault | {' | '.join(FAULTY)} |", f"|---|{'---|' * len(FAULTY)}"]
    for fault in dict.fromkeys(fault for each in trainings.values() for fault in each["faults"]):
        rows.append(f"| {fault} | {' | '.join(_found(trainings, fault, kind) for kind in FAULTY)} |")
    return "\n".join(rows) + "\n"


def _found(trainings: dict[str, Any], fault: str, kind: str) -> str:
    tried = [each["faults"][fault][kind] for each in trainings.values() if fault in each["faults"]]
    missed = [one for one in tried if not one["failed"]]
    answers = f"; {sum(one['answers_changed'] for one in missed)} of {sum(one['answers'] for one in missed)} answers"
    return f"{len(tried) - len(missed)} of {len(tried)}" + (answers if missed else "")


PAGES = {"recipe.md": recipe_page, "findings.md": findings_page, "gates-measured.md": gates_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")

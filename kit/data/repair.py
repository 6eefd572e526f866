"""Safe repairs of rows: what can be mended without guessing what somebody meant."""

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.files import writing
from kit.common.secrets import secret
from kit.data.encodings import FIXED, other_encoding
from kit.data.findings import CONTROL
from kit.data.rows import Place, progress, rows_of
from kit.data.shapes import NAMES, TURNS, Fault, renamed, to_messages
from kit.data.sources import files_of, local_path, meant
from kit.gguf.messages import texts
from kit.recipe.recipe import Recipe

ROW_NAMES = (*NAMES, "input", "system")
SHOWN = 5  # places kept of each repair
# In this order: "\r" is a control character too.
TEXT_REPAIRS: dict[str, Callable[[str], str]] = {
    "line ends written as \\n": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "control characters removed": lambda text: CONTROL.sub("", text),
    "characters composed as usual (NFC)": lambda text: unicodedata.normalize("NFC", text)}
NEAR = 0.8  # how alike a name must be to be taken for a known one (difflib's ratio)


class Repairs(Counter[str]):
    """What was done, with how many rows it was done to; `places` has the first few of them.

    `encodings` are the files that were not in UTF-8, and what they were read as.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, list[Place]] = {}
        self.encodings: dict[Path, str] = {}

    def add(self, what: str, place: Place) -> None:
        self[what] += 1
        if self[what] <= SHOWN:
            self.places.setdefault(what, []).append(place)


def fix(source: str, out: Path, recipe: Recipe) -> Repairs:
    """Write the rows of `source`, repaired, to `out` (.jsonl); what was done, and to which rows.

    Left out are rows that still can't be trained or hold a secret, and the second of two equal ones. Raises KitError
    when `out` exists already.
    """
    check_out(source, out, recipe)
    done, columns = Repairs(), meant(source, recipe).recipe.columns
    done.encodings = {path: name for path in files_of(source, recipe) or () if path.suffix.lower() in FIXED
                      and (name := other_encoding(path))}
    seen: set[int] = set()
    with writing(out) as file, progress(f"repairing {source}", source, recipe) as on_bytes:
        for row in rows_of(source, recipe, on_bytes, any_encoding=True):
            if row.raw is None:
                done.add(f"left out: {row.faults[0].code}", row.place)
                continue
            value, changes = repaired(renamed(row.raw, columns))
            _, messages, faults = to_messages(value)
            if any(map(secret, texts(messages))):
                faults = [Fault("secret", "")]
            key = hash(tuple((m["role"], *(text.strip() for text in m.values())) for m in messages))
            if faults or key in seen:
                done.add(f"left out: {faults[0].code if faults else 'duplicate'}", row.place)
                continue
            seen.add(key)
            for change in set(changes):
                done.add(change, row.place)
            done["rows written"] += 1
            # A date or a decimal of a Parquet file's other columns is written as text.
            file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
        if not done["rows written"]:
            raise KitError(f"--fix: no row of {source} can be trained, so nothing was written", "see the findings")
    return done


def check_out(source: str, out: Path, recipe: Recipe) -> None:
    """KitError when `fix` could not write there, or not read that."""
    if out.suffix.lower() != ".jsonl":
        raise KitError(f"--fix {out}: the repaired copy is written as JSON Lines", "end its name in .jsonl")
    if out.exists():
        raise KitError(f"--fix {out} exists already", "name a new file; nothing is ever overwritten")
    if source == "starter" or local_path(meant(source, recipe).place) is None:
        raise KitError(f"--fix works on files, and {source} is none", "download it and name the file")


def repaired(row: Any) -> tuple[Any, list[str]]:
    """The row with its safe repairs, and what they were; the row itself is not changed."""
    if not isinstance(row, dict):
        return row, []
    changes: list[str] = []
    if any(fault.code == "misnamed_field" for fault in to_messages(row).faults):
        row = _names(row, ROW_NAMES, changes)
    row = dict(row)
    for field in ROW_NAMES:
        if field in row and not isinstance(row[field], (list, dict)):
            row[field] = _text(row[field], changes)
    for field in TURNS:
        if isinstance(row.get(field), list):
            row[field] = [_turn(turn, *TURNS[field], changes) for turn in row[field]]
    if isinstance(row.get("history"), list):
        row["history"] = [[_text(text, changes) for text in pair] if isinstance(pair, list) else pair
                          for pair in row["history"]]
    return row, changes


def _names(row: dict[str, Any], known: Sequence[str], changes: list[str]) -> dict[str, Any]:
    """Names that are nearly known ones, where no other name of the row is or becomes that."""
    made: dict[str, Any] = {}
    for key, value in row.items():
        name = _name(key, known, {*row, *made})
        if name is not key:
            changes.append(f"renamed: {key} to {name}")
        made[name] = value
    return made


def _name(name: Any, known: Iterable[str], taken: Container[str] = ()) -> Any:
    """`name`, or the one of `known` it nearly is, unless that is taken."""
    if not isinstance(name, str) or name in known:
        return name
    close = get_close_matches(name.strip().lower(), [other for other in known if other not in taken], 1, NEAR)
    return close[0] if close else name


def _turn(turn: Any, role: str, text: str, roles: dict[str, str], changes: list[str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    turn = _names(turn, (role, text), changes)
    if (new := _name(turn.get(role), roles)) is not turn.get(role):
        changes.append(f"renamed: role {turn[role]} to {new}")
        turn[role] = new
    for key in (text, "reasoning_content"):
        if isinstance(turn.get(key), list):  # OpenAI's text parts
            turn[key] = [{**part, "text": _text(part["text"], changes)} if isinstance(part, dict) and "text" in part
                         else part for part in turn[key]]
        elif key in turn:
            turn[key] = _text(turn[key], changes)
    return turn


def _text(value: Any, changes: list[str]) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        changes.append("numbers written as text")
        return str(value)
    if not isinstance(value, str):
        return value
    for what, mended in TEXT_REPAIRS.items():
        if (text := mended(value)) != value:
            changes.append(what)
            value = text
    return value

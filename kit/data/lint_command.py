"""`kit lint`: the data check at the command line."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from kit.common.errors import KitError
from kit.common.show import show
from kit.data.lint import lint
from kit.data.repair import check_out, fix
from kit.data.sources import files_of
from kit.recipe.recipe import Recipe


def recipe_of(data: str | None, recipe: str | None, fields: dict[str, Any]) -> Recipe:
    """The recipe whose data is checked, with `data` for its dataset. Raises KitError for what is neither."""
    if data is not None and "=" in data and not Path(data).exists():
        raise KitError(f"{data!r} is no data: the first argument is what to check", "kit lint DATA FIELD=VALUE …")
    if data is None and recipe is None:
        raise KitError("nothing to check", "kit lint DATA, or kit lint --recipe RECIPE")
    return Recipe.load(recipe or {}, **{**fields, **({} if data is None else {"dataset": data})})


def check(recipe: Recipe, html: Path | None, copy: Path | None, as_json: bool, rows: int, defaults: bool) -> int:
    """Print what the data check says; exit code 0 without findings of severity error, 1 with.

    Writes the page to `html` and the repaired rows to `copy`; shows so many `rows` token by token. `defaults` says
    that no recipe was named.
    """
    for path in (html, copy):
        if path is not None and not path.parent.is_dir():
            raise KitError(f"{path}: there is no folder {path.parent}", "make it first")
    first, *others = recipe.sources
    for source in recipe.sources:
        files_of(source, recipe)  # a missing file is reported before anything is loaded
    if copy and others:
        raise KitError("--fix takes one source", "kit lint DATA --fix OUT for each of them")
    if copy:
        check_out(first, copy)
    # Only the JSON goes to standard output, so that it can be piped; whatever libraries print goes beside it.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = lint(recipe)
    if as_json:
        print(json.dumps(report.figures, ensure_ascii=False, indent=2))
    else:
        show(report)
        if defaults:
            print(f"checked as the default recipe trains (tokens of {report.figures['tokenizer']}); for your model: "
                  "--recipe RECIPE")
        for tokens in report.examples(rows):
            print()
            show(tokens)
    if html:
        report.save(html)
        print(f"page: {html}", file=sys.stderr)
    if copy:
        _repair(first, copy, recipe)
    return 1 if report.errors else 0


def _repair(source: str, copy: Path, recipe: Recipe) -> None:
    repairs = fix(source, copy, recipe)
    print(f"repaired copy: {copy}", file=sys.stderr)
    for what, count in repairs.most_common():
        places = ", ".join(map(str, repairs.places.get(what, [])))
        more = ", …" if count > len(repairs.places.get(what, [])) else ""
        print(f"  {count:,} × {what}" + (f": {places}{more}" if places else ""), file=sys.stderr)

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
from kit.data.repair import check_out
from kit.data.repair import fix as repair
from kit.data.sources import files_of
from kit.recipe.recipe import Recipe


def check(data: str | None, recipe: str | None, fields: dict[str, Any], html: Path | None, fix: Path | None,
          as_json: bool, rows: int) -> int:
    """Print what the data check says; exit code 0 without findings of severity error, 1 with."""
    if data is not None and "=" in data and not Path(data).exists():
        raise KitError(f"{data!r} is no data: the first argument is what to check", "kit lint DATA FIELD=VALUE …")
    if data is None and recipe is None:
        raise KitError("nothing to check", "kit lint DATA, or kit lint --recipe RECIPE")
    if data is not None:
        fields = {**fields, "dataset": data}
    chosen = Recipe.load(recipe or {}, **fields)
    for path in (html, fix):
        if path is not None and not path.parent.is_dir():
            raise KitError(f"{path}: there is no folder {path.parent}", "make it first")
    for source in chosen.sources:
        files_of(source, chosen)  # what is not there is told before anything is loaded
    if fix:
        if len(chosen.sources) > 1:
            raise KitError("--fix takes one source", "kit lint DATA --fix OUT for each of them")
        check_out(next(iter(chosen.sources)), fix)
    # Only the JSON goes to standard output, so that it can be piped; whatever libraries print goes beside it.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = lint(chosen)
    if as_json:
        print(json.dumps(report.figures, ensure_ascii=False, indent=2))
    else:
        show(report)
        if recipe is None:
            print(f"checked as the default recipe trains (tokens of {report.figures['tokenizer']}); for your model: "
                  "--recipe RECIPE")
        for tokens in report.examples(rows):
            print()
            show(tokens)
    if html:
        report.save(html)
        print(f"page: {html}", file=sys.stderr)
    if fix:
        done = repair(next(iter(chosen.sources)), fix, chosen)
        print(f"repaired copy: {fix}", file=sys.stderr)
        for what, count in done.most_common():
            places = ", ".join(map(str, done.places.get(what, [])))
            more = ", …" if count > len(done.places.get(what, [])) else ""
            print(f"  {count:,} × {what}" + (f": {places}{more}" if places else ""), file=sys.stderr)
    return 1 if report.errors else 0

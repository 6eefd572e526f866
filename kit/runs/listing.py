"""`kit list`: the runs of a folder, with what became of each."""

from pathlib import Path
from typing import Any

from kit.common.files import read_json
from kit.common.show import Table, size
from kit.runs.run import file_sizes, read_result

VERDICTS: dict[Any, str] = {True: "VERIFIED", False: "FAILED"}


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Name, status, verdict, held-out score (of the best stage that has one) and bytes of each run, newest first."""
    found = []
    for recipe in folder.glob("*/recipe.yaml"):
        run, result = recipe.parent, read_result(recipe.parent)
        verify, scores = read_json(run / "verify.json"), result.get("scores") or {}
        score = next((scores[stage]["exact"] for stage in ("after", "before")
                      if "exact" in (scores.get(stage) or {})), None)
        status = str(result.get("status") or "no result")
        found.append({
            "name": run.name, "status": status if status == "finished" else f"{status} at {result.get('stage', '?')}",
            "verdict": VERDICTS.get(verify.get("passed"), "not verified"),
            "score": score, "bytes": sum(file_sizes(run).values()), "started": str(result.get("started") or "")})
    return sorted(found, key=lambda run: run["started"], reverse=True)


def table(folder: Path) -> Table:
    """The runs for people; the score is the share of held-out answers that are as expected."""
    rows = [[run["name"], run["status"], run["verdict"], "–" if run["score"] is None else f"{run['score']:.1%}",
             size(run["bytes"]), run["started"][:16].replace("T", " ")] for run in runs_in(folder)]
    return Table(["run", "status", "verdict", "held-out score", "size", "started"], rows, f"{len(rows)} in {folder}")

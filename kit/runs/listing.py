"""`kit list`: the runs of a folder, with what became of each."""

from pathlib import Path
from typing import Any

from kit.common.show import Table, size
from kit.runs.report import scored_rows, verified
from kit.runs.run import Run, file_sizes, read_result

VERDICTS = {True: "VERIFIED", False: "FAILED", None: "not verified"}


def runs_in(folder: Path) -> list[dict[str, Any]]:
    """Name, status, verdict, held-out score after training, of how many rows, and bytes of each run, newest first."""
    found = []
    for recipe in folder.glob("*/recipe.yaml"):
        run = Run(recipe.parent)
        result = read_result(run.folder)
        scores = result.get("scores") or {}
        score = (scores.get("after") or {}).get("exact")
        status = str(result.get("status") or "no result")
        found.append({
            "name": run.folder.name,
            "status": status if status == "finished" else f"{status} at {result.get('stage', '?')}",
            "verdict": VERDICTS[verified(run)],
            "score": score, "rows": scored_rows(result),
            "bytes": sum(file_sizes(run.folder).values()), "started": str(result.get("started") or "")})
    return sorted(found, key=lambda run: run["started"], reverse=True)


def table(folder: Path) -> Table:
    """The runs for people; the score is the share of held-out answers that are as expected."""
    rows = [[run["name"], run["status"], run["verdict"], _score(run), size(run["bytes"]),
             run["started"][:16].replace("T", " ")] for run in runs_in(folder)]
    return Table(["run", "status", "verdict", "held-out score", "size", "started"], rows, f"{len(rows)} in {folder}")


def _score(run: dict[str, Any]) -> str:
    if run["score"] is None:
        return "–"
    return f"{run['score']:.1%}" + (f" of {run['rows']:,}" if run["rows"] else "")

"""runs/<name>/report.html: one page that says whether what is shipped is what was trained, and how the run went.

The page needs no network and runs no script. It is a sibling of the data check's page (kit/data/lint_page.html).
"""

import base64
import json
import math
import re
import shlex
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import ChainableUndefined, Environment
from markupsafe import Markup

from kit.common.files import read_json, write_text
from kit.common.secrets import redacted
from kit.common.show import duration, scores, size
from kit.data.findings import CONTROL
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.run import Run, file_sizes, read_result

FIGURES = {"loss.png": "Loss of each optimiser step", "lengths.png": "Row lengths in tokens",
           "scores.png": "Held-out score of each stage"}
FORECAST = {"peak_memory_gb": "memory at most", "disk_gb": "disk", "steps": "optimiser steps",
            "train_seconds": "training time"}
Z = 1.959964  # of the normal distribution 95 % lie within so many standard deviations
# Half a surrogate pair is no UTF-8; the others a reader would not see, or they would turn the text's direction.
UNSEEN = re.compile(f"{CONTROL.pattern}|[\ud800-\udfff]")


class Verdict(NamedTuple):
    """The page's first line; `kind` (clean, warning, error) is its colour, `command` what to type next."""

    kind: str
    headline: str
    remark: str = ""
    command: str = ""


def write_report(run: Run) -> Path:
    """Write `report.html` into the run's folder from what lies there, and return its path.

    A run that failed, was stopped or was not verified gets a page as well, which says so. Secrets in the run's files
    (kit.common.secrets.SECRETS) are replaced by their kind. KitError when the disk refuses.
    """
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=ChainableUndefined, finalize=_printed, trim_blocks=True,
                       lstrip_blocks=True)
    page.filters.update(number=_number, share=_share, duration=_duration, when=_when, size=size,
                        quoted=lambda path: shlex.quote(str(path)))
    path = run.folder / "report.html"
    write_text(path, page.from_string(source).render(_contents(run)))
    return path


def _holds_out(recipe: dict[str, Any]) -> bool:
    """Recipe.holds_out of unchecked fields; True where they say nothing."""
    sources = recipe.get("dataset")
    return not recipe or bool(recipe.get("eval_dataset") or recipe.get("test_size")
                              or "starter" in ([sources] if isinstance(sources, str) else sources or ()))


def ollama_name(name: str) -> str:
    """A run's name as Ollama takes it: ASCII letters, digits, - and . (its docs/api.md)."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "my-model"


def _contents(run: Run) -> dict[str, Any]:
    """What the template shows. A part that the run never came to is empty."""
    result, manifest = read_result(run.folder), read_json(run.folder / "manifest.json")
    gates, doubt = _verification(run, result, manifest)
    recipe = _read_recipe(run)
    stages = result.get("scores") or {stage: result[f"score_{stage}"] for stage in ("before", "after")
                                      if result.get(f"score_{stage}")}
    answered = result["answered"] if scored_rows(result) else None
    return {
        "name": run.folder.resolve().name, "result": result, "manifest": manifest, "recipe": recipe,
        "verdict": _verdict(run, result, gates, doubt),
        "gates": sorted(gates.gates, key=lambda gate: gate.passed is not False) if gates else [],
        "failed": bool(gates and gates.failed), "summary": gates.verdict if gates else "",
        "score": _score(result, stages), "answers": _answers(result), "holds_out": _holds_out(recipe),
        "ollama_name": ollama_name(run.folder.resolve().name),
        "stages": stages, "scores": scores(answered, **stages) if any(stages.values()) else None,
        "train": _training(run, result), "forecast": _forecast(result), "figures": _figures(run),
        "files": _files(run, result, manifest), "differences": _differences(recipe),
        "run": run, "adapter": (run.adapter / "adapter_config.json").is_file(),
        "merged": (run.merged / "config.json").is_file(), "modelfile": (run.gguf / "Modelfile").is_file(),
        "gguf": any(run.gguf.glob("*.gguf")),
        "beside": [name for name in ("data.html", "notebook.ipynb") if (run.folder / name).is_file()]}


def _verification(run: Run, result: dict[str, Any], manifest: dict[str, Any]) -> tuple[Gates | None, str]:
    """The gates of verify.json, or None with the reason why they can't be relied on ('' when there are none)."""
    path = run.folder / "verify.json"
    if not path.is_file():
        return None, ""
    verify = read_json(path)
    if verify.get("verdict") and verify.get("passed") is None:
        return None, str(verify["verdict"])
    try:
        gates = Gates.from_json("gates", verify["gates"])
    except (KeyError, TypeError):
        return None, "verify.json is damaged"
    if verify.get("passed") is not gates.passed or all(gate.passed is None for gate in gates.gates):
        return None, "verify.json contradicts itself, or no gate in it says pass or fail"
    checked, started = _moment(verify.get("checked")), _moment(result.get("started"))
    if checked and started and checked.astimezone() < started.astimezone():
        return None, "verify.json is older than this run: what it checked is no longer here"
    if verify.get("artefacts") != manifest.get("artefacts"):
        return None, "verify.json is about other files than those the run holds now"
    gates.title = f"checked {_when(verify.get('checked'))}, in {_duration(verify.get('seconds'))}"
    return gates, ""


def verified(run: Run) -> bool | None:
    """Whether every gate passed, by a verify.json that is about what the finished run holds; None where none is."""
    result = read_result(run.folder)
    gates, _ = _verification(run, result, read_json(run.folder / "manifest.json"))
    return gates.passed if gates and result.get("status") == "finished" else None


def _verdict(run: Run, result: dict[str, Any], gates: Gates | None, doubt: str) -> Verdict:
    """How the run ended comes first: the gates of a run that did not finish can't make it whole."""
    status, stage = result.get("status"), result.get("stage")
    if not status:
        return Verdict("error", "NO RESULT: the folder holds no readable result.json")
    if status == "running":
        return Verdict("warning", f"RUNNING: at the stage {stage}",
                       "This page shows the run as it was when the page was written.")
    if status != "finished":
        return Verdict("error", f"{str(status).upper()}: the run ended at the stage {stage}", result.get("reason", ""))
    if gates is None:
        return Verdict("warning", "not verified:", doubt and doubt + ".", f"kit verify {shlex.quote(str(run.folder))}")
    if gates.failed:
        return Verdict("error", gates.verdict, gates.title)
    return Verdict("clean", "VERIFIED: what is shipped is what was trained", f"{gates.verdict}; {gates.title}")


def _score(result: dict[str, Any], stages: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Share of held-out answers that are right before and after training, its rows and its 95 % interval."""
    rows, found = scored_rows(result), []
    for when, stage in (("before training", "before"), ("after training", "after")):
        share = (stages.get(stage) or {}).get("exact")
        if isinstance(share, (int, float)) and 0 <= share <= 1:
            low, high = interval(share, rows) if rows else (None, None)
            found.append({"when": when, "share": share, "rows": rows, "low": low, "high": high})
    return found


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` answers: Wilson's, which holds for few answers and near 0 and 1 too.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212.
    """
    square = Z * Z / count
    middle, half = share + square / 2, Z * math.sqrt((share * (1 - share) + square / 4) / count)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def _answers(result: dict[str, Any]) -> dict[str, Any]:
    """Headings, the answers that the run kept as (heading, text), and of how many rows; {} where there are none."""
    rows = result.get("answers")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return {}
    return {"heads": list(rows[0]), "rows": [list(row.items()) for row in rows],
            "of": scored_rows(result)}


def scored_rows(result: dict[str, Any]) -> int:
    """Over how many held-out rows a run's scores are; 0 where result.json does not say."""
    answered = result.get("answered")
    counts = list(answered.values()) if isinstance(answered, dict) else []
    return min(counts, default=0) if all(isinstance(count, int) and count >= 0 for count in counts) else 0


def _training(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Steps, tokens, seconds, speed and losses; of a run that stopped on the way, as far as log.jsonl goes."""
    entries = []
    for line in run.log.read_text(encoding="utf-8", errors="replace").splitlines() if run.log.is_file() else []:
        with suppress(ValueError):  # a killed process can leave half a line
            entries.append(json.loads(line))
    if not entries:
        return {}
    last, losses = entries[-1], [entry["loss"] for entry in entries if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10):]
    seconds, tokens = last.get("seconds"), last.get("tokens")
    return {"steps": last.get("step"), "tokens": tokens, "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            **result.get("train", {}), "first_loss": losses[0] if losses else None,
            "last_loss": sum(tail) / len(tail) if tail else None, "last_steps": len(tail)}


def _forecast(result: dict[str, Any]) -> list[list[str]]:
    """[what, forecast, happened, happened / forecast]; what was not forecast has no row, and a bound no ratio."""
    forecast, ratios = result.get("forecast") or {}, result.get("forecast_score") or {}
    happened = {**result.get("train", {}), "peak_memory_gb": result.get("peak_memory_gb")}
    if forecast.get("disk_gb") and ratios.get("disk_gb"):
        happened["disk_gb"] = forecast["disk_gb"] * ratios["disk_gb"]  # which files count, the score knows
    return [[label, _with_unit(name, forecast[name]), _with_unit(name, happened.get(name)),
             _number(None if name == "peak_memory_gb" else ratios.get(name), 2)] for name, label in FORECAST.items()
            if forecast.get(name) is not None]


def _with_unit(name: str, value: Any) -> str:
    """A forecast's figure with its unit, which its name tells."""
    if name.endswith("_seconds"):
        return _duration(value)
    return f"{_number(value, 2)} GB" if name.endswith("_gb") and value is not None else _number(value)


def _figures(run: Run) -> dict[str, tuple[str, Markup]]:
    """{file name: (caption, data URI)} of the pictures that are there."""
    return {name: (caption, Markup(f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"))
            for name, caption in FIGURES.items() if (path := run.figures / name).is_file()}


def _files(run: Run, result: dict[str, Any], manifest: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(path in the run folder, bytes, sha256 or ''); of a run that did not finish, the files it has now."""
    files = result.get("files") or {**file_sizes(run.folder), "report.html": 0}
    digests = manifest.get("artefacts") or {}
    return [(name, count, digests.get(name, "")) for name, count in files.items() if count or name != "report.html"]


def _differences(recipe: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(field, value, default, what it does) of the recipe's fields that were set to something else."""
    rows = []
    for name, value in recipe.items():
        field = Recipe.model_fields.get(name)
        if field is None:
            rows.append((name, _yaml(value), "–", "not a field of this version of the kit"))
        elif value != field.default:
            rows.append((name, _yaml(value), _yaml(field.default), field.description or ""))
    return rows


def _read_recipe(run: Run) -> dict[str, Any]:
    """The recipe's fields unchecked, so that a run of another version of the kit has a page too."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        fields = yaml.safe_load((run.folder / "recipe.yaml").read_text(encoding="utf-8"))
        return fields if isinstance(fields, dict) else {}
    return {}


def _printed(value: Any) -> Any:
    """Every value on its way into the page (jinja2's finalize, before escaping): no secret, nothing unseen."""
    if isinstance(value, Markup):  # a picture, or parts that came through here already
        return value
    return UNSEEN.sub(lambda match: f"U+{ord(match[0]):04X}", redacted(str(value)))


def _number(value: Any, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else "–"


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else "–"


def _duration(seconds: Any) -> str:
    return duration(seconds) if isinstance(seconds, (int, float)) else "–"


def _moment(stamp: Any) -> datetime | None:
    """A time in ISO 8601; None for anything else."""
    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(stamp)
    return None


def _when(stamp: Any) -> str:
    """A time as it was written, without the seconds."""
    moment = _moment(stamp)
    return f"{moment:%Y-%m-%d %H:%M %z}".strip() if moment else str(stamp)


def _yaml(value: Any) -> str:
    """A value on one line, as a recipe would state it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()

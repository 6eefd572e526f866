"""The figures of a run, as matplotlib figures that are also saved as PNG."""

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure


def _figure(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """A figure of its own (not pyplot's), so that nothing is shown twice and no window is needed."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path) -> Figure:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    figure.set_label(f"figure: {path}")
    return figure


def lengths(rows: Any, max_seq_length: int, path: Path) -> Figure:
    """Histogram of row lengths in tokens, with the trained part apart; of many rows the first 10,000."""
    first = rows[:10_000]
    total = sorted(map(len, first["input_ids"]))
    trained = [sum(label != -100 for label in labels) for labels in first["labels"]]
    figure, axes = _figure(f"{len(rows):,} rows: median {total[len(total) // 2]}, "
                           f"95 % up to {total[int(0.95 * (len(total) - 1))]}, longest {total[-1]} of "
                           f"{max_seq_length} tokens", "tokens", "rows")
    bins = range(0, total[-1] + 2, max(1, total[-1] // 40))
    axes.hist(total, bins=bins, alpha=0.6, label="whole row")
    axes.hist(trained, bins=bins, alpha=0.6, label="trained")
    axes.legend()
    return _save(figure, path)


def loss(result: Any, path: Path) -> Figure:
    """A TrainResult's loss by logged step, of many their mean too; held-out loss, its best, where training resumed."""
    steps, values = zip(*result.losses, strict=True)
    window = max(1, len(values) // 10)
    smooth = [fmean(values[max(0, end - window):end]) for end in range(1, len(values) + 1)]
    figure, axes = _figure(f"loss {values[0]:.3f} → {smooth[-1]:.3f} in {result.steps} steps",
                           "optimiser step", "loss (nats per trained token)")
    axes.plot(steps, values, alpha=0.4 if window > 1 else 1, label="logged")
    if window > 1:
        axes.plot(steps, smooth, label=f"mean of {window}")
    if result.evaluations:
        evaluated, held_out = zip(*((entry["step"], entry["loss"]) for entry in result.evaluations), strict=True)
        axes.plot(evaluated, held_out, marker="o", color="tab:green", label="held-out rows")
    if result.best_step is not None:
        axes.axvline(result.best_step, color="tab:green", linestyle=":", label=f"best: step {result.best_step}")
    if result.resumed_from:
        axes.axvline(result.resumed_from, color="gray", linestyle="--", label=f"resumed at step {result.resumed_from}")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, path)


def before_after(scores: dict[str, dict[str, float]], path: Path, rows: int) -> Figure | None:
    """Bars: the held-out score of each stage over so many rows, whole answer and every field; None without a score."""
    scores = {stage: values for stage, values in scores.items() if values}
    if not scores:
        return None
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    figure, axes = _figure(f"held-out score of {rows:,} rows", "", "share of answers that are right")
    width = 0.8 / len(scores)
    for number, (stage, values) in enumerate(scores.items()):
        bars = axes.bar([i + number * width for i in range(len(names))], [values.get(name, 0) for name in names],
                        width, label=stage)
        axes.bar_label(bars, fmt="{:.0%}", fontsize=8)
    labels = ["whole answer" if name == "exact" else name for name in names]
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], labels)
    axes.set_ylim(0, 1.15)
    axes.legend(loc="upper left", ncols=len(scores), fontsize=8)
    return _save(figure, path)

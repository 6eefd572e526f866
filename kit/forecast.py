"""What a run will need, said before it: memory, disk, steps, and after two steps the time; and how well that was said.

Memory is what has to lie there at once, part by part, from the sizes in config.json and the safetensors headers: no
weights are read, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.forecast_memory import NF4_BYTES, Lengths, memory_parts, trained_in_float32
from kit.forecast_model import Checkpoint, local_model
from kit.gguf import BITS, VOCABULARY_BYTES, needed_bytes
from kit.masks import IGNORED
from kit.processes import world_size

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from kit.platforms import Machine
    from kit.recipe import Recipe

FORECAST_FOLDERS = ("adapter", "merged", "merged-4bit", "gguf", "checkpoints")
ANSWERED_AT_ONCE = 20  # kit.infer.answer's batch
ANSWERED_WITHOUT_HELD_OUT_ROWS = 3


@dataclass(frozen=True)
class Forecast:
    """A run's needs; all sizes in GB of 1e9 bytes. None is what can't be known yet, and `notes` say why.

    `peak_memory_gb`: the training process on a CPU, the GPU's memory on a GPU. `disk_gb`: what the run leaves in its
    folder; `room_gb`: what the disk must have free for it, with what is there only for a while. `tokens`: read in all
    steps, without padding. `memory_gb` and `files_gb` are the parts by name; answering and a training step are not
    at work together, so the peak counts the larger of the two.
    """

    peak_memory_gb: float | None = None
    disk_gb: float | None = None
    room_gb: float | None = None
    steps: int | None = None
    tokens: int | None = None
    memory_gb: dict[str, float] = field(default_factory=dict)
    files_gb: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def _table(self) -> Any:
        from kit.show import Table

        rows = [[f"memory: {name}", _gb(size)] for name, size in self.memory_gb.items()]
        rows += [["memory at its peak", _gb(self.peak_memory_gb)]]
        rows += [[f"disk: {name}", _gb(size)] for name, size in self.files_gb.items()]
        rows += [["disk in all", _gb(self.disk_gb)], ["steps", _count(self.steps)], ["tokens", _count(self.tokens)]]
        return Table(["forecast", ""], rows, "; ".join(self.notes))

    def __repr__(self) -> str:
        return repr(self._table())

    def _repr_html_(self) -> str:
        return str(self._table()._repr_html_())


def _gb(size: float | None) -> str:
    return "?" if size is None else f"{size:.2f} GB"


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def forecast(recipe: Recipe, data: DatasetDict | None = None, there: Machine | None = None) -> Forecast:
    """The forecast of a run, from the real rows where `data` (of kit.load_data) is given.

    Without `data` every row is taken to be max_seq_length long: an upper bound. Without `there` this machine is
    looked at, as far as that goes without torch.
    """
    rows = len(data["train"]) if data is not None else None
    lengths = _lengths(data["train"], "input_ids") if data is not None else []
    steps = steps_of(recipe, rows) if rows else recipe.max_steps
    tokens = tokens_of(recipe, data["train"], steps) if data is not None and steps else None
    notes = () if lengths else ("row lengths are not known: max_seq_length is assumed, an upper bound",)
    model = local_model(recipe)
    if isinstance(model, str):
        return Forecast(steps=steps, tokens=tokens, notes=(*notes, model))
    device, bf16 = (there.device, there.bf16) if there else look()
    memory = memory_parts(model, recipe, _known(recipe, data, lengths, steps), device, bf16)
    peak = sum(memory.values()) - min(memory["activations"] + memory["logits"], memory["answers"])
    files, temporary = _files(model, recipe, steps)
    disk = sum(files.values())
    return Forecast(_round(peak), _round(disk), _round(disk + temporary), steps, tokens,
                    {name: _round(size) for name, size in memory.items()},
                    {name: _round(size) for name, size in files.items()}, notes)


def _known(recipe: Recipe, data: DatasetDict | None, lengths: list[int], steps: int | None) -> Lengths:
    """Lengths of the real rows, and bounds where they are not known."""
    bound = recipe.max_seq_length
    trained = _lengths(data["train"], "labels", trained=True) if data is not None and lengths else []
    held_out = _lengths(data["test"], "input_ids") if data is not None else []
    answered = (len(held_out) if data is not None else recipe.max_eval_samples) or ANSWERED_WITHOUT_HELD_OUT_ROWS
    different = len(set(lengths)) if lengths else bound
    return Lengths(max(lengths, default=bound), max(trained, default=bound),
                   min(different, (steps or bound) * recipe.gradient_accumulation_steps),
                   min(answered, ANSWERED_AT_ONCE), max(held_out or lengths, default=bound))


def _round(size: float) -> float:
    return round(size / 1e9, 6)


def _lengths(rows: Dataset, column: str, trained: bool = False) -> list[int]:
    """Tokens of each row, or those the loss counts; [] where rows are tokenised only when they are taken."""
    if column not in rows.column_names or not len(rows):
        return []
    import pyarrow as pa
    import pyarrow.compute as pc

    lists = rows.with_format("arrow")[column][:]
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    if not trained:
        return list(pc.list_value_length(lists).to_pylist())
    whose = pc.list_parent_indices(lists).filter(pc.not_equal(pc.list_flatten(lists), IGNORED))
    return [count["counts"] for count in pc.value_counts(whose).to_pylist()]


def look() -> tuple[str, bool]:
    """(cuda or cpu, whether it computes in bfloat16) without importing torch."""
    if "torch" in sys.modules:
        from kit.platforms import machine

        there = machine()
        return there.device, there.bf16
    if shutil.which("nvidia-smi"):
        return "cuda", True
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "cpu", False
    return "cpu", bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


def steps_of(recipe: Recipe, rows: int) -> int:
    """Optimiser steps of a run over `rows` rows, as transformers' Trainer counts them.

    Trainer.set_initial_training_values: batches of a pass (rounded up; each process takes its share of them, rounded
    up) over gradient_accumulation_steps (rounded up, at least 1), times num_train_epochs, rounded up.
    """
    return recipe.max_steps or math.ceil((recipe.num_train_epochs or 1.0) * _steps_a_pass(recipe, rows))


def _steps_a_pass(recipe: Recipe, rows: int) -> int:
    batches = math.ceil(math.ceil(rows / recipe.per_device_train_batch_size) / world_size())
    return max(1, math.ceil(batches / recipe.gradient_accumulation_steps))


def rows_seen(recipe: Recipe, rows: int, steps: int) -> int:
    """Rows that go through the model in `steps` steps; the last step of a pass may be a short one."""
    passes, rest = divmod(steps, _steps_a_pass(recipe, rows))
    batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * world_size()
    return passes * rows + min(rest * batch, rows)


def tokens_of(recipe: Recipe, rows: Dataset, steps: int) -> int | None:
    """Tokens without padding that `steps` steps over these rows read; None for rows tokenised when they are taken."""
    lengths = _lengths(rows, "input_ids")
    return round(rows_seen(recipe, len(rows), steps) * sum(lengths) / len(rows)) if lengths else None


def _files(model: Checkpoint, recipe: Recipe, steps: int | None) -> tuple[dict[str, float], float]:
    """Bytes of what a run leaves by folder, and of what it needs for a while besides.

    Sizes of GGUFs are those that kit.gguf asks free room for: k-quants of wide models come out smaller.
    """
    saved = model.parameters * 2 if recipe.full_finetuning else \
        model.adapter(recipe) * (2 if recipe.quantised else 4)
    # Adam's two moments have the number format of the weights they belong to; full ones leave in 16-bit at the end.
    wide = 2 if trained_in_float32(recipe) else 1
    checkpoint = 3 * saved * wide + model.tokenizer_bytes
    merged = model.weight_bytes + model.tokenizer_bytes
    files: dict[str, float] = {} if recipe.full_finetuning else {"adapter": saved + model.tokenizer_bytes}
    temporary = 0.0
    if recipe.full_finetuning:
        files["merged"] = saved + model.tokenizer_bytes
    elif recipe.save_merged != "none":
        files["merged"] = merged
    if recipe.save_merged == "4bit":
        linear = sum(math.prod(shape) for shape in model.linears.values())
        files["merged-4bit"] = linear * NF4_BYTES + (model.parameters - linear) * 2 + model.tokenizer_bytes
    if recipe.gguf:
        files["gguf"] = sum(int(model.parameters * BITS[name] / 8) + VOCABULARY_BYTES for name in recipe.gguf)
        temporary = max(0.0, needed_bytes(model.parameters, recipe.gguf) - files["gguf"])
    if recipe.checkpoint_dir:
        return files, temporary
    if kept := checkpoints_left(recipe, steps):
        files["checkpoints"] = kept * checkpoint
        temporary = max(temporary, checkpoint)  # an old one goes when the new one is there
    elif recipe.save_minutes:
        temporary = max(temporary, ((recipe.save_total_limit or 1) + 1) * checkpoint)  # if it takes that long
    return files, temporary


def checkpoints_left(recipe: Recipe, steps: int | None) -> int:
    """How many checkpoints are left at most besides those of save_minutes; the last step is always saved."""
    def times(strategy: str, every: int) -> int:
        if strategy == "steps":
            return math.ceil(steps / every) if steps else recipe.save_total_limit or 1
        return math.ceil(recipe.num_train_epochs or 1) if strategy == "epoch" else 0

    best = recipe.load_best_model_at_end
    # Each evaluation may be the best so far, and then it is saved and kept besides the newest ones.
    made = times(recipe.save_strategy, recipe.save_steps) + best * times(recipe.eval_strategy, recipe.eval_steps)
    return min(made, recipe.save_total_limit + best) if recipe.save_total_limit else made


class Pace:
    """Training time from the first two steps: give `step` each step's seconds and tokens without padding.

    The rest of the run is taken to cost per token what the second step costs: the first one warms up, and with
    train_sampling_strategy: group_by_length the first steps have the longest rows, so steps would not do. Where tokens
    are not known beforehand (`tokens` None, as with lazy_preprocess) steps have to do.
    """

    def __init__(self, steps: int, tokens: float | None) -> None:
        self.steps, self.tokens = steps, tokens
        self._seen: list[tuple[float, int]] = []

    def step(self, seconds: float, tokens: int) -> float | None:
        """After the second step the seconds of the whole training, else None."""
        self._seen.append((seconds, tokens))
        if len(self._seen) != 2:
            return None
        (first, early), (second, now) = self._seen
        if self.tokens and now:
            return round(first + second + second / now * max(0.0, self.tokens - early - now), 1)
        return round(first + second * (self.steps - 1), 1)


def score(said: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """What happened divided by what was forecast, for each figure that both know; 1 is exact.

    `said` has peak_memory_gb, disk_gb, steps, train_seconds; `result` is result.json. Disk counts adapter, merged,
    gguf and checkpoints: notebook, figures and pages are not forecast.
    """
    train = result.get("train") or {}
    files: dict[str, int] = result.get("files") or {}
    kept = sum(size for name, size in files.items() if _folder(name) in FORECAST_FOLDERS)
    happened = {"peak_memory_gb": result.get("peak_memory_gb"), "disk_gb": kept / 1e9, "steps": train.get("steps"),
                "train_seconds": train.get("train_seconds")}
    return {name: round(value / said[name], 3) for name, value in happened.items() if value and said.get(name)}


def _folder(name: str) -> str:
    return name.replace("\\", "/").partition("/")[0]

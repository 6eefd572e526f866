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

from kit.common.show import Table
from kit.gguf.formats import file_bytes, needed_bytes
from kit.models.size import Checkpoint, local_model
from kit.readiness.forecast_memory import NF4_BYTES, Lengths, memory_parts, trained_in_float32
from kit.recipe.machine import Machine, machine
from kit.recipe.recipe import Recipe
from kit.training.steps import _lengths, steps_of, tokens_of

if TYPE_CHECKING:
    from datasets import DatasetDict

ANSWERED_AT_ONCE = 20  # kit.answer's batch
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


def look() -> tuple[str, bool]:
    """(cuda or cpu, whether it computes in bfloat16) without importing torch."""
    if "torch" in sys.modules:
        there = machine()
        return there.device, there.bf16
    if shutil.which("nvidia-smi"):
        return "cuda", True
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return "cpu", False
    return "cpu", bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


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
        files["gguf"] = sum(file_bytes(model.parameters, name) for name in recipe.gguf)
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

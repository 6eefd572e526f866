"""Another tool's options as recipe fields: by the table, and what the table can't say."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from kit.common.errors import KitError, one_line
from kit.common.secrets import secret
from kit.recipe.fields import Fields
from kit.recipe.foreign import Row, Tool, rows_named, tools
from kit.recipe.foreign_datasets import DATASETS
from kit.recipe.foreign_files import Option, Source
from kit.recipe.foreign_values import normal, short
from kit.recipe.reading import SECRET_NAME
from kit.recipe.recipe import Recipe

LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora", "loftq_config",
        "adapter_name_or_path", "load_in_4bit", "load_in_8bit")
OTHER_STAGES = {"stage": ("sft",), "rlhf_type": (), "rl": (), "reward_model": ()}
BY_ITSELF = "`kit run RECIPE`"  # what every run does
LAUNCHER = ("nnodes", "node_rank", "master_addr", "master_port", "rdzv_backend", "rdzv_endpoint", "rdzv_id",
            "standalone")
SWITCHED_OFF = Row("", "–", "", "", "")  # of an option that only has lines for being on
OUR_OWN = ("trust_remote_code", "run_name", "overwrite")  # fields that another tool's file does not decide


@dataclass
class Converted:
    """`values` of the recipe, `origins` of each in words, and what has no counterpart or is done otherwise; of a file
    that only merges, the command that does so here."""

    tool: Tool
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    merging: str = ""

    def put(self, name: str, value: Any, origin: str) -> None:
        """A field's value; one that means "by itself" there is left out."""
        value = normal(name, value)
        if value is not None:
            self.values[name], self.origins[name] = value, origin

    def drop(self, name: str, why: str) -> None:
        """Take a field out again, and say so if the file has set it."""
        if name in self.values:
            value, origin = self.values.pop(name), self.origins.pop(name)
            if not origin.endswith(" default"):
                self.lost.append((f"{origin.partition(':')[0]}: {short(value)}", why))


def convert(source: Source) -> Converted:
    """The recipe's values by what the file sets and, where it says nothing, by the tool's defaults.

    Raises KitError for what is no supervised finetuning.
    """
    done = Converted(tools()[source.tool])
    given = {option.name: option.value for option in source.options if option.value is not None}
    for name, possible in OTHER_STAGES.items():
        if (stage := str(given.get(name) or "").lower()) and stage not in possible:
            raise KitError(f"{name}: {stage}: only supervised finetuning is here",
                           "TRL's other trainers take the model that kit.load_model and kit.add_lora give")
    if (method := str(given.get("finetuning_type")).lower()) in ("freeze", "oft"):
        raise KitError(f"finetuning_type: {method}: here an adapter or all weights are trained",
                       "set it to lora or full; LoRA on some layers only: target_modules")
    for option in {option.name: option for option in source.options}.values():  # of several the last counts
        _take(done, option, given, source)
    if given.get("export_dir") or given.get("merge_lora"):
        _merging(done, given)
    else:
        _fill(done, given, source)
    _settle(done)
    _check(done)
    needed = {"model_name": "model"} | ({} if done.merging else {"dataset": "data set"})
    for name, what in needed.items():
        if name not in done.values:
            done.lost.insert(0, (f"no {what} is named", f"set {name}; without it the starter's is taken"))
    done.lost += [(note, "") for note in source.notes]
    return done


def _take(done: Converted, option: Option, given: dict[str, Any], source: Source) -> None:
    """One option: by its tool's own rule, by the table's line for it, or as the field of the same name."""
    name, value, shown = option
    if value is None or value in ("", {}):
        return
    if SECRET_NAME.search(name) or secret(json.dumps(value, default=str)):
        done.lost.append((name, "a secret is never written: HF_TOKEN in the environment, or `hf auth login`"))
        return
    told = f"{shown}: {short(value)}"
    if rule := DATASETS.get((source.tool, name)):
        rule(done, value, told, given, source.folder)
    elif (name in LAUNCHER and str(value) in ("0", "1", "True")) or name in LAUNCHER[1:]:
        return  # torchrun's own, and said to it again
    elif name.startswith("fsdp") or name in ("deepspeed", "nproc_per_node", "num_processes"):
        _processes(done, name, value, told)
    elif name == "resume_from_checkpoint" and isinstance(value, str) and "/" in value:
        done.lost.append((told, "a run here resumes its own checkpoints; to train that adapter further: "
                                "adapter_name_or_path"))
    elif (name == "warmup_ratio" and given.get("warmup_steps")) or (
            name == "warmup_steps" and not value and given.get("warmup_ratio")):
        return  # steps count before a share
    elif row := _row(done.tool, name, value):
        _by_row(done, row, value, shown, told)
    elif name in Fields.model_fields and name not in OUR_OWN:
        done.put(name, value, shown)
    elif name not in OUR_OWN:
        done.lost.append((told, "not known here: nothing is made of it"))
    elif value is True and name == "trust_remote_code":
        done.lost.append((told, "left out, as code that comes with a model is run only if the recipe says so"))


def _row(tool: Tool, name: str, value: Any) -> Row | None:
    """The tool's line for this option with this value, then its line for any, then what all tools share."""
    for one in dict.fromkeys((tool.key, "transformers")):
        rows = list(rows_named(name, [tools()[one]]))
        for row in rows:
            if str(value).lower() in row.values:
                return row
        for row in rows:
            if not row.values:
                return row
        if rows and value is False:
            return SWITCHED_OFF
    # A script of anybody's: what any tool calls so, where all mean the same by it.
    others = {row.fields[0][0]: row for row in rows_named(name) if row.fields and not row.values}
    return next(iter(others.values())) if len(others) == 1 else None


def _by_row(done: Converted, row: Row, value: Any, shown: str, told: str) -> None:
    if not row.fields:
        if (row.here.startswith(BY_ITSELF) and value is not False) or (row.here == "–" and value is False):
            return  # done anyway, or switched off there and not here at all
        here = "" if row.here == "–" else row.here.replace("`", "")
        done.lost.append((told, "; ".join(filter(None, (here, row.remark.replace("`", ""))))))
        return
    if row.values:
        for name, constant in row.fields:
            done.put(name, value if constant is None else constant, told)
        return
    # An option for a field of its own name, among several of a line; else the line's first field.
    names = [name for name, _ in row.fields]
    if row.remark.startswith("there "):
        done.lost.append((told, row.remark.replace("`", "")))
    own = shown.rpartition(".")[2].lstrip("-").replace("-", "_")
    first = own if own in names else names[0]
    done.put(first, value, shown)
    for name, constant in row.fields:
        if constant is not None and name != first and name not in done.values and name == "save_strategy":
            done.put(name, constant, shown)


def _processes(done: Converted, name: str, value: Any, told: str) -> None:
    """How many processes share the work: said on the command line here, not in the recipe."""
    if name in ("nproc_per_node", "num_processes"):
        if str(value) not in ("1", "auto", "gpu"):
            done.lost.append((told, f"torchrun --nproc_per_node {value} -m kit train RECIPE: rows per step count in "
                                    "each process"))
    elif name.startswith("fsdp"):
        if value and name == "fsdp":
            done.lost.append((told, "torchrun --nproc_per_node 2 -m kit train RECIPE fsdp=true"))
    elif value:
        stage = re.search(r"z(?:ero)?[_-]?(?:stage)?([23])", str(value).lower())
        file = f"recipes/deepspeed/zero{stage[1] if stage else 2}.json"
        done.lost.append((told, f"for several processes: torchrun --nproc_per_node 2 -m kit train RECIPE "
                                f"deepspeed={file}"))


def _merging(done: Converted, given: dict[str, Any]) -> None:
    """A file that only merges: the command that does so here."""
    adapter = given.get("adapter_name_or_path") or given.get("adapters") or "FOLDER"
    adapter = adapter[0] if isinstance(adapter, list) else adapter
    done.values = {name: value for name, value in done.values.items() if name in ("model_name", "prompt_style")}
    base, out = done.values.get("model_name", "MODEL"), given.get("export_dir") or given.get("output_dir") or "OUT"
    done.lost = [(what, why) for what, why in done.lost if not why.startswith("kit export")]
    done.merging = f"kit export {adapter} --base {base} --out {out}"


def _fill(done: Converted, given: dict[str, Any], source: Source) -> None:
    """The tool's defaults where the file says nothing."""
    tool = done.tool
    full = done.values.get("full_finetuning")
    if tool.key == "axolotl" and full is None and not given.get("adapter"):
        done.put("full_finetuning", True, "no adapter")
    if tool.key == "finetune" and full is None:
        done.put("full_finetuning", True, f"{tool.name}'s default")
    full = done.values.get("full_finetuning", False)
    own = tool.defaults | ({} if full else tool.lora_defaults) | _computed(tool, given, bool(full))
    base = tools()[source.trainer or tool.based_on or tool.key]
    if source.trainer:
        own = {name: value for name, value in own.items() if name not in base.defaults}
    if tool.key == "pipeline":
        done.put("prompt_style", "chatml", "the pipeline writes ChatML")
    filled = Converted(tool)
    for name, value in (base.defaults | own).items():
        _take(filled, Option(name, value, (tool if name in own else base).name), given, source)
    for ours, taken in filled.values.items():
        if ours not in done.values and taken != Fields.model_fields[ours].default:
            whose = filled.origins[ours].partition(":")[0]
            done.put(ours, taken, f"{whose}' default" if whose.endswith("s") else f"{whose}'s default")
    if tool.unseen:
        done.lost.append((tool.unseen, ""))


def _computed(tool: Tool, given: dict[str, Any], full: bool) -> dict[str, Any]:
    """Defaults that depend on other options."""
    with suppress(TypeError, ValueError, ZeroDivisionError):
        if tool.key == "llamafactory" and not full:
            return {"lora_alpha": 2 * int(given.get("lora_rank", 8))}
        if tool.key == "swift":
            rows = int(given.get("per_device_train_batch_size", 1)) * int(given.get("nproc_per_node", 1))
            held_out = given.get("val_dataset") or given.get("split_dataset_ratio")
            return {"gradient_accumulation_steps": max(1, -(-16 // rows)), "learning_rate": 1e-5 if full else 1e-4,
                    "eval_strategy": given.get("save_strategy", "steps") if held_out else None}
    return {}


def _settle(done: Converted) -> None:
    """What excludes one another there by rank, and here by a refusal."""
    values = done.values
    if isinstance(steps := values.get("max_steps"), (int, float)) and steps > 0:
        done.drop("num_train_epochs", "max_steps counts before it")
    else:
        values.pop("max_steps", None)
    if values.get("full_finetuning"):
        for name in ("load_in_4bit", "load_in_8bit", "adapter_name_or_path"):
            if values.get(name):
                done.drop(name, "without LoRA all weights are trained, in 16 or 32 bits")
        for name in LORA:
            values.pop(name, None)
    if values.get("bf16"):
        values.pop("fp16", None)
    if values.get("load_in_4bit"):
        values.pop("load_in_8bit", None)
    else:
        for name in [name for name in values if name.startswith("bnb_4bit") or name == "loftq_config"]:
            values.pop(name)
    for name in ("loftq_config", "test_size"):
        if not values.get(name):
            values.pop(name, None)
    if values.get("loftq_config"):
        done.drop("gguf", "an adapter that LoftQ began can't be merged")
        done.put("save_merged", "none", "loftq_config")
    _settle_held_out(done)
    schedule = str(values.get("lr_scheduler_type", ""))
    if schedule.startswith("cosine_with_min") or schedule in ("one_cycle", "rex"):
        done.lost.append((f"{done.origins['lr_scheduler_type']}: {schedule}", "cosine, which ends at 0"))
        values["lr_scheduler_type"] = "cosine"


def _settle_held_out(done: Converted) -> None:
    """Evaluations need rows that are held out, and early stopping needs evaluations."""
    values = done.values
    if values.get("eval_dataset"):
        done.drop("test_size", "eval_dataset counts before it")
    if not values.get("eval_dataset") and not values.get("test_size"):
        if values.get("eval_strategy") not in (None, "no", False):
            done.drop("eval_strategy", "no held-out rows: set test_size or eval_dataset")
        values.pop("eval_strategy", None)
    if values.get("eval_strategy") in (None, "no", False):
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if values.get(name):
                done.drop(name, "needs evaluations: set eval_strategy")
            values.pop(name, None)


def _check(done: Converted) -> None:
    """Values that a field refuses are taken out, with the reason."""
    while True:
        try:
            Recipe(**done.values)
            break
        except ValidationError as error:
            problems = {str(problem["loc"][0]): problem["msg"] for problem in error.errors() if problem["loc"]}
            if not problems.keys() & done.values.keys():
                raise KitError(f"the options contradict one another here: {one_line(error, 400)}",
                               "set one of them as field=value") from None
            for name, why in problems.items():
                done.drop(name, why.removeprefix("Value error, "))

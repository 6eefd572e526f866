"""The recipe: one flat set of fields under the names of Unsloth, PEFT and TRL.

A YAML file states what differs from the defaults; the same file drives the notebook,
papermill and the command line. `Recipe.load(path, learning_rate="1e-4")` reads and checks it.
"""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kit.errors import KitError, nearest
from kit.gguf import QUANTIZATIONS

# A parameter of such a name holds a secret, and everything a notebook is given is published with it.
SECRET_NAME = re.compile(r"(^|_)(token|secret|password|passwd|credentials?|(api|access|auth|private)_?key)$", re.I)
NO_SECRETS = "tokens come from the environment (HF_TOKEN) or the hub's own login (hf auth login), never from a recipe"
PROJECT = Path(__file__).resolve().parent.parent
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_ERRORS = 20
# The names a row's fields can have, in the shapes that kit.shapes reads; the last four are those of a turn.
FIELDS = ("messages", "conversations", "instruction", "input", "output", "system", "history", "prompt", "completion",
          "question", "answer", "role", "content", "from", "value")


def _field(default: Any, text: str, unit: str = "", **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"unit": unit}, **bounds)


class Recipe(BaseModel):
    """Every choice of a run. Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    # Run
    run_name: str = _field("run", "Name of the run's folder below output_dir.", pattern=r"^[\w.+-]+$")
    output_dir: str = _field("runs", "Folder in which every run gets a folder of its own.", "path")

    # Model
    model_name: str = _field("starter", "A hub id, a folder, or `starter` for the packaged 135M model.", min_length=1)
    revision: str | None = _field(None, "Branch, tag or commit of a model on the hub.")
    max_seq_length: int = _field(2048, "Longest row in training; overlong_rows says what becomes of longer ones.",
                                 "tokens", ge=8, le=1_048_576)
    dtype: Literal["bfloat16", "float16", "float32"] | None = _field(
        None, "Number format of the weights; by default the best this machine computes in.")
    load_in_4bit: bool = _field(False, "QLoRA: freeze the base model in 4-bit NF4, a quarter of the memory.")
    load_in_8bit: bool = _field(False, "Freeze the base model in 8-bit, half of the memory.")
    full_finetuning: bool = _field(False, "Train all weights instead of a LoRA adapter.")
    trust_remote_code: bool = _field(False, "Run Python code that comes with the model: only for authors you trust.")
    local_files_only: bool = _field(False, "Never ask the hub; use folders and the local cache only.")
    hub: Literal["huggingface", "modelscope"] = _field("huggingface", "Where hub ids are looked up.")

    # LoRA
    r: int = _field(16, "Rank of the adapter: more learns more and costs memory; 8 to 64 is usual.", "",
                    ge=1, le=1024)
    lora_alpha: int = _field(16, "Strength: the adapter is scaled by lora_alpha / r; keep that in 0.5 to 2.", "",
                               gt=0, le=4096)
    lora_dropout: float = _field(0.0, "Dropout inside the adapter; 0 is fastest, 0.05 to 0.1 against overfitting.",
                                 "share", ge=0, lt=1)
    target_modules: list[str] = _field(PROJECTIONS, "Linear layers that get an adapter: attention and MLP.",
                                       min_length=1)
    bias: Literal["none", "all", "lora_only"] = _field("none", "Which biases are trained; `none` is the safe one.")
    use_gradient_checkpointing: bool | Literal["unsloth"] = _field(
        "unsloth", "Recompute activations to save memory; `unsloth` also offloads them on a GPU.")
    random_state: int = _field(3407, "Seed of the adapter's first values.", ge=0, le=2**32 - 1)
    use_rslora: bool = _field(False, "Scale by lora_alpha / sqrt(r): steadier at high rank.")
    loftq_config: dict[str, Any] | None = _field(None, "PEFT's LoftQ settings for a start that corrects 4-bit error.")

    # Data
    dataset: str | list[str] | dict[str, float] = _field(
        "starter", "A file, a folder, a hub id or `starter`; several as a list, or with weights as {source: passes}: "
        "2 takes every row twice, 0.5 a seeded half.")
    dataset_config: str | None = _field(None, "Configuration (subset) of a data set on a hub.")
    dataset_split: str = _field("train", "Split that is read from a hub or a folder.", min_length=1)
    dataset_revision: str | None = _field(None, "Branch, tag or commit of a data set on a hub.")
    columns: dict[str, str] = _field(
        {}, "Other field names: {prompt: 问题, completion: 答案} reads 问题 as prompt and 答案 as completion.")
    eval_dataset: str | None = _field(None, "Held-out rows from a file of their own.", min_length=1)
    test_size: float = _field(0.0, "Share (below 1) or number of rows held out when eval_dataset is not set; rows "
                              "with the same prompt stay on one side.", "share or rows", ge=0)
    eval_overlap: Literal["error", "drop", "keep"] = _field(
        "error", "Held-out rows whose prompt is also trained on: refuse, leave them out of the held-out rows, or keep.")
    max_train_samples: int | None = _field(None, "Train on the first rows only.", "rows", ge=1)
    max_eval_samples: int = _field(100, "Held-out rows answered before and after training.", "rows", ge=0)
    prompt_style: Literal["chat", "chatml", "alpaca"] = _field(
        "chat", "Template: the model's own (chat), ChatML, or Alpaca's three headings.")
    system_prompt: str | None = _field(None, "System message for rows that have none of their own.")
    enable_thinking: bool | None = _field(None, "For models that can think aloud (Qwen3): what the template is told.")
    train_on_responses_only: bool = _field(True, "Loss on the answers and their stop token only, not on prompts.")
    last_response_only: bool = _field(False, "Of a conversation of several turns, train the last answer only.")
    overlong_rows: Literal["drop", "truncate_prompt", "error"] = _field(
        "drop", "Rows longer than max_seq_length: leave out, shorten the middle of their longest prompt, or refuse. "
        "Answers are never cut.")
    lazy_preprocess: bool = _field(False, "Keep rows on disk and tokenise them when they are used: for data larger "
                                   "than memory.")
    metric: Literal["json", "exact", "none"] = _field(
        "none", "How held-out answers are scored: JSON fields, exact text, or not at all.")

    # Training (TRL's SFTConfig)
    per_device_train_batch_size: int = _field(2, "Rows per forward pass on each device.", "rows", ge=1, le=4096)
    gradient_accumulation_steps: int = _field(4, "Forward passes added up before each optimiser step.", "passes",
                                              ge=1, le=65536)
    max_steps: int | None = _field(None, "Optimiser steps in all; set this or num_train_epochs.", "steps", ge=-1)
    num_train_epochs: float | None = _field(None, "Passes over the data; 1 when neither is set.", "epochs",
                                            gt=0, le=10_000)
    learning_rate: float = _field(2e-4, "Peak learning rate; 1e-4 to 3e-4 is usual for LoRA.", "per step",
                                  gt=0, le=1)
    warmup_steps: float = _field(5, "Steps (1 and more) or share of the run (below 1) in which the rate rises.",
                                 "steps or share", ge=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt", "reduce_lr_on_plateau", "warmup_stable_decay"] = _field(
        "linear", "How the learning rate falls after the warm-up.")
    optim: str = _field("adamw_8bit", "Optimiser by transformers' name; 8-bit ones need a GPU.", min_length=1)
    weight_decay: float = _field(0.01, "Pull of the trained weights towards zero; 0 to 0.01 is usual for LoRA.",
                                 "per step", ge=0, le=1)
    adam_beta1: float = _field(0.9, "Memory of Adam's mean.", "", ge=0, lt=1)
    adam_beta2: float = _field(0.999, "Memory of Adam's variance; 0.95 reacts faster.", "", ge=0, lt=1)
    max_grad_norm: float = _field(1.0, "Gradients longer than this are shortened to it.", "", ge=0)
    neftune_noise_alpha: float | None = _field(None, "Noise on the embeddings against overfitting; 5 is usual.", ge=0)
    bf16: bool | None = _field(None, "Mixed precision in bfloat16; by default chosen for this machine.")
    fp16: bool | None = _field(None, "Mixed precision in float16; by default chosen for this machine.")
    packing: bool = _field(False, "Join short rows to full length (GPU): faster on short rows.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = _field(
        "random", "Order of rows; group_by_length wastes less padding.")
    dataloader_num_workers: int = _field(0, "Extra processes that load rows.", "processes", ge=0, le=64)
    logging_steps: int = _field(1, "Steps between two log lines.", "steps", ge=1)
    save_strategy: Literal["no", "steps", "epoch"] = _field("no", "When checkpoints are written.")
    save_steps: int = _field(500, "Steps between two checkpoints.", "steps", ge=1)
    save_total_limit: int | None = _field(2, "Checkpoints kept, the newest.", "checkpoints", ge=1)
    report_to: str = _field("none", "Where curves are sent besides the run folder: none, tensorboard, wandb.")
    seed: int = _field(3407, "Seed of row order and dropout.", ge=0, le=2**32 - 1)

    # Inference
    max_new_tokens: int = _field(128, "Longest answer.", "tokens", ge=1, le=131_072)
    temperature: float = _field(0.0, "0 answers with the likeliest token; higher is more varied.", "", ge=0, le=5)
    top_p: float = _field(1.0, "Sample from the likeliest tokens that make up this share.", "share", gt=0, le=1)
    top_k: int = _field(0, "Sample from this many likeliest tokens; 0 for all.", "tokens", ge=0)
    min_p: float = _field(0.0, "Leave out tokens below this share of the likeliest one.", "share", ge=0, le=1)
    repetition_penalty: float = _field(1.0, "Above 1 makes repeated tokens less likely.", "", gt=0, le=5)

    # Export
    save_merged: Literal["none", "16bit"] = _field("16bit", "Whether the adapter is merged into a 16-bit model.")
    gguf: list[str] = _field([], f"GGUF files to write: {', '.join(QUANTIZATIONS)}; [] for none.")
    num_ctx: int | None = _field(None, "Context in the Modelfile; by default max_seq_length.", "tokens", ge=8)

    @field_validator("dataset", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        names = list(value) if isinstance(value, (list, dict)) else [value]
        if not names or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError("a source is a file, a folder, a hub id or `starter`; several are a list of them")
        if len(set(names)) < len(names):
            raise ValueError("a source is named twice; to take its rows twice write {source: 2}")
        if isinstance(value, dict):
            for name, passes in value.items():
                if isinstance(passes, bool) or not isinstance(passes, (int, float)) or not 0 < passes <= 1000:
                    raise ValueError(f"the weight of {name} is how often its rows are taken, above 0 and up to 1000")
        return value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in FIELDS:
                raise ValueError(f"{name!r} is no field of a row{nearest(name, FIELDS)}; there are: "
                                 f"{', '.join(FIELDS)}")
        if len(set(columns.values())) < len(columns):
            raise ValueError("one column stands for two fields")
        return columns

    @field_validator("gguf")
    @classmethod
    def _known_quantizations(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in QUANTIZATIONS:
                raise ValueError(
                    f"{name!r} is no quantisation{nearest(name, QUANTIZATIONS)}; there are: {', '.join(QUANTIZATIONS)}"
                )
        return list(dict.fromkeys(names))

    @field_validator("max_steps")
    @classmethod
    def _no_zero_steps(cls, steps: int | None) -> int | None:
        if steps == 0:
            raise ValueError("0 steps train nothing; leave it out (or -1) to train by num_train_epochs")
        return None if steps == -1 else steps

    @field_validator("test_size")
    @classmethod
    def _share_or_rows(cls, size: float) -> float:
        if (size > 1 and size != int(size)) or size == 1:
            raise ValueError("a share must be below 1 and a number of rows a whole number of 2 or more")
        return size

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        both = [
            ("max_steps", "num_train_epochs", "max_steps would win silently; keep one of them"),
            ("load_in_4bit", "load_in_8bit", "the base model has one precision; keep one of them"),
            ("load_in_4bit", "full_finetuning", "quantised weights can't be trained; set one of them to false"),
            ("load_in_8bit", "full_finetuning", "quantised weights can't be trained; set one of them to false"),
            ("fp16", "bf16", "mixed precision has one format; keep one, or neither for the machine's best"),
        ]
        problems = [f"{a} and {b} are both set: {why}" for a, b, why in both if getattr(self, a) and getattr(self, b)]
        if self.eval_dataset and self.test_size:
            problems.append("eval_dataset and test_size are both set: keep the file or the share")
        if self.last_response_only and not self.train_on_responses_only:
            problems.append("last_response_only and train_on_responses_only: false exclude each other: keep one")
        if self.gguf and self.save_merged == "none":
            problems.append("gguf is made from the merged model: set save_merged to 16bit, or gguf to []")
        if self.loftq_config and not self.load_in_4bit:
            problems.append("loftq_config corrects 4-bit error: set load_in_4bit, or leave loftq_config out")
        if self.loftq_config and self.save_merged != "none":
            problems.append("a LoftQ adapter belongs to its own quantised base and can't be merged into the 16-bit "
                            "one: set save_merged: none and gguf: [], or leave loftq_config out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def sources(self) -> dict[str, float]:
        """What `dataset` names, each with how often its rows are taken."""
        if isinstance(self.dataset, dict):
            return dict(self.dataset)
        return dict.fromkeys([self.dataset] if isinstance(self.dataset, str) else self.dataset, 1.0)

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | Recipe, **overrides: Any) -> Recipe:
        """Read a YAML file (or take a dict or a recipe), put `overrides` on top, check everything.

        Raises KitError that lists up to 20 problems, each with its line in the file.
        """
        lines: dict[str, int] = {}
        where = ""
        if isinstance(source, Recipe):
            values = source.model_dump(exclude_unset=True)
        elif isinstance(source, dict):
            values = dict(source)
        else:
            path = _find(source)
            where = str(source)
            values, lines = _read_yaml(path)
            values.setdefault("run_name", path.stem)
        for asked, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
            if overrides.get(asked) and other not in overrides:
                values.pop(other, None)  # the length asked for just now replaces the file's
        values.update(overrides)
        _refuse_secrets(values)
        try:
            return cls(**values)
        except ValidationError as error:
            found = [_explain(e, where, lines, overrides) for e in error.errors()[:MAX_ERRORS]]
            what = where or "the recipe"
            count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
            raise KitError(f"{what}: {count}\n  " + "\n  ".join(found),
                           "every field with its bounds: docs/recipe.md") from None

    def dump(self) -> str:
        """All fields, resolved, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def given(cls, namespace: dict[str, Any]) -> dict[str, Any]:
        """The recipe fields among a notebook's variables: what papermill or a person set there.

        A variable that is nearly a field's name is taken for a slip and refused.
        """
        from kit.checks import secret

        plain = (str, int, float, bool, list, dict, types.NoneType)
        taken = {}
        for name, value in namespace.items():
            if name.startswith("_") or not isinstance(value, plain):
                continue
            if value and (SECRET_NAME.search(name) or (isinstance(value, str) and secret(value, addresses=False))):
                raise KitError(f"the notebook's parameter {name!r} looks like a secret, and papermill writes every "
                               "parameter into the notebook it makes", f"delete that notebook; {NO_SECRETS}")
            if name in cls.model_fields:
                taken[name] = value
            elif len(name) > 4 and (close := nearest(name, cls.model_fields, cutoff=0.8)):
                raise KitError(f"the notebook's parameter {name!r} is no recipe field{close}",
                               "correct its name, or rename the variable")
        return taken


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """['learning_rate=1e-4', 'gguf=[q8_0]'] → fields; each value is read as YAML."""
    from kit.checks import secret

    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            told = secret(pair, addresses=False)  # not to be repeated in a log
            raise KitError(f"{told or repr(pair)} is not field=value", "for example learning_rate=1e-4 or gguf=[q8_0]")
        if SECRET_NAME.search(name):
            raise KitError(f"{name!r} looks like a secret, and every field is written into the run", NO_SECRETS)
        if name not in Recipe.model_fields:
            raise KitError(f"{name!r} is no recipe field{nearest(name, Recipe.model_fields)}",
                           "every field with its bounds: docs/recipe.md")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise KitError(f"{pair!r}: the value is not YAML: {_one_line(error)}", "quote it") from None
    return values


def _refuse_secrets(values: dict[str, Any]) -> None:
    """KitError for a field named like a secret, or a value that looks like one; the value itself is not repeated."""
    from kit.checks import secret

    for name, value in values.items():
        if SECRET_NAME.search(name):
            raise KitError(f"{name!r} looks like a secret, and every field is written into the run", NO_SECRETS)
        if told := secret(json.dumps(value, ensure_ascii=False, default=str), addresses=False):
            raise KitError(f"{name} holds what looks like a secret ({told}), and every field is written into the run",
                           NO_SECRETS)


def _find(source: str | Path) -> Path:
    """The recipe file: as given, or below the project."""
    for path in (Path(source).expanduser(), PROJECT / source):
        if path.is_file():
            return path
        if path.is_dir():
            raise KitError(f"{source} is a folder, not a recipe", "name a .yaml file")
    known = sorted(p.name for p in (PROJECT / "recipes").glob("*.yaml"))
    raise KitError(f"there is no recipe {source}{nearest(Path(source).name, known)}",
                   "recipes here: " + ", ".join(f"recipes/{name}" for name in known))


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's fields and the line each stands on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise KitError(f"{path}: not UTF-8 text (byte {error.start})", "save the recipe as UTF-8") from None
    except yaml.YAMLError as error:
        raise KitError(f"{path}: not YAML: {_one_line(error)}", "a recipe is lines of `field: value`") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise KitError(f"{path}: a recipe is lines of `field: value`, this is a {type(values).__name__}",
                       "see recipes/quickstart.yaml")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            raise KitError(f"{path}:{key.start_mark.line + 1}: {key.value} is set twice "
                           f"(first on line {lines[key.value]})", "keep one")
        lines[key.value] = key.start_mark.line + 1
    return {str(k): v for k, v in values.items()}, lines


def _explain(error: Any, where: str, lines: dict[str, int], overrides: dict[str, Any]) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    place = f"{where}:{lines[name]}: " if name in lines and name not in overrides else ""
    if error["type"] == "extra_forbidden":
        return f"{place}{name!r} is no recipe field{nearest(name, Recipe.model_fields)}"
    text = error["msg"].removeprefix("Value error, ")
    if not name:
        return text
    field = Recipe.model_fields.get(name)
    about = f" ({field.description})" if field and field.description else ""
    return f"{place}{name}: {error['input']!r}: {text[:1].lower()}{text[1:]}{about}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def reference() -> str:
    """docs/recipe.md: a table of every field, made from this module."""
    rows = ["# Recipe fields", "", "Made by `make docs` from `kit/recipe.py`.", "",
            "| field | default | bounds | unit | what it does |", "|---|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        extra = field.json_schema_extra
        unit = extra.get("unit", "") if isinstance(extra, dict) else ""
        rows.append(f"| `{name}` | `{_plain(field.default)}` | {_bounds(name)} | {unit} | {field.description} |")
    return "\n".join(rows) + "\n"


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _bounds(name: str) -> str:
    schema = Recipe.model_json_schema()["properties"][name]
    parts = [schema, *schema.get("anyOf", [])]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {part[key]:g}" for part in parts for key, sign in signs.items() if key in part]
    found += [", ".join(str(v) for v in part["enum"]) for part in parts if "enum" in part]
    return "; ".join(found)


if __name__ == "__main__":
    print(reference(), end="")

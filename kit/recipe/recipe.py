"""The recipe: one flat set of fields under the names of Unsloth, PEFT and TRL.

A YAML file states what differs from the defaults; the same file drives the notebook,
papermill and the command line. `Recipe.load(path, learning_rate="1e-4")` reads and checks it.
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Self, Union, get_args, get_origin

import yaml
from pydantic import ValidationError, ValidationInfo, field_validator, model_validator

from kit.common.errors import nearest
from kit.gguf.formats import QUANTIZATIONS
from kit.recipe.fields import ALL_LINEAR, ALL_LINEAR_TOO, ROLE_WORDS, ROW_FIELDS, Columns, Fields
from kit.recipe.reading import read_parameters, read_values, refusal
from kit.recipe.trackers import named

SAVE_METHODS = {"merged_16bit": "16bit", "merged_4bit": "4bit", "merged_4bit_forced": "4bit", "lora": "none"}


class Recipe(Fields):
    """Every choice of a run. Frozen; unknown names are refused."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        """`all`, `all-linear` and `q_proj,v_proj` as they are written elsewhere."""
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        every = isinstance(names, list) and ALL_LINEAR_TOO & {str(name).lower() for name in names}
        if every and len(names) > 1:
            raise ValueError(f"{ALL_LINEAR} stands alone: it is every linear layer but the head")
        return [ALL_LINEAR] if every else names

    @field_validator("gguf", mode="before")
    @classmethod
    def _quantizations(cls, value: Any) -> Any:
        """`q4_k_m` and `Q4_K_M,q8_0` without brackets; `none` and false for none."""
        if value in (None, False):
            return []
        if isinstance(value, str):
            value = [] if value.strip().lower() in ("", "none", "null") else value.split(",")
        return [name.strip().lower() if isinstance(name, str) else name for name in value] \
            if isinstance(value, list) else value

    @field_validator("save_merged", mode="before")
    @classmethod
    def _merged(cls, value: Any) -> Any:
        """Unsloth's save_method."""
        none = value is None or value is False
        return "none" if none else SAVE_METHODS.get(value, value) if isinstance(value, str) else value

    @field_validator("dataset", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        # A comma may be part of a file's name; of name#a,b it separates the entries.
        if isinstance(value, str) and "," in value and "#" not in value and not Path(value).expanduser().exists():
            value = [name.strip() for name in value.split(",") if name.strip()]
            value = value[0] if len(value) == 1 else value
        names = list(value) if isinstance(value, (list, dict)) else [value]
        if any(isinstance(name, str) and "#" in name and "," in name for name in names):
            value = {each: value[name] for name in names for each in _entries(name)} if isinstance(value, dict) else \
                [each for name in names for each in _entries(name)]
            names = list(value)
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
    def _known_columns(cls, columns: Columns) -> Columns:
        _refuse_unknown(columns, dict.fromkeys((*ROW_FIELDS, *ROLE_WORDS)), "field of a row")
        for known, what in ((ROW_FIELDS, "column stands for two fields"), (ROLE_WORDS, "word stands for two roles")):
            words = [word for name, word in columns.items() if name in known and word is not None]
            if len(set(words)) < len(words):
                raise ValueError(f"one {what}")
        return columns

    @field_validator("gguf")
    @classmethod
    def _known_quantizations(cls, names: list[str]) -> list[str]:
        _refuse_unknown(names, QUANTIZATIONS, "quantisation")
        return list(dict.fromkeys(names))

    @field_validator("report_to", mode="before")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else named(value)

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

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, about: ValidationInfo) -> Any:
        """What YAML reads as a truth value is the word that was meant (`eval_strategy: no`), and is never a number.
        None is null. It stands last: of those that look at a value before its type, pydantic asks the last one first.
        """
        kinds = list(_kinds(cls.model_fields[str(about.field_name)].annotation))
        nothing = value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null", "~"))
        if nothing and cls.model_fields[str(about.field_name)].default == "none":
            return "none"
        if nothing and type(None) in kinds:
            return None
        if isinstance(value, bool) and bool not in kinds:
            meant = [word for word in (("yes", "on") if value else ("no", "off")) if word in kinds]
            if meant or int in kinds or float in kinds:
                return meant[0] if meant else _refuse(f"{str(value).lower()} is no number")
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        both = [
            ("max_steps", "num_train_epochs", "max_steps would win silently; keep one of them"),
            ("load_in_4bit", "load_in_8bit", "the base model has one precision; keep one of them"),
            ("load_in_4bit", "full_finetuning", "quantised weights can't be trained; set one of them to false"),
            ("load_in_8bit", "full_finetuning", "quantised weights can't be trained; set one of them to false"),
            ("fsdp", "deepspeed", "both shard the model; keep one of them"),
            ("full_finetuning", "adapter_name_or_path", "full finetuning has no adapter; keep one of them"),
            ("fp16", "bf16", "mixed precision has one format; keep one, or neither for the machine's best"),
            ("eval_dataset", "test_size", "keep the file or the share"),
        ]
        problems = [f"{a} and {b} are both set: {why}" for a, b, why in both if getattr(self, a) and getattr(self, b)]
        if (self.bf16 and self.dtype == "float16") or (self.fp16 and self.dtype == "bfloat16"):
            problems.append(f"dtype: {self.dtype} and {'bf16' if self.bf16 else 'fp16'} are both set: 16-bit weights "
                            "and products have one format; keep one, or set dtype: float32")
        if self.chat_template and self.prompt_style != "chat":
            problems.append("chat_template and prompt_style are both set: each is the template; keep one of them")
        if self.last_response_only and not self.train_on_responses_only:
            problems.append("last_response_only and train_on_responses_only: false exclude each other: keep one")
        if self.gguf and self.save_merged == "none":
            problems.append("gguf is made from the merged model: set save_merged to 16bit, or gguf to []")
        if self.loftq_config and not self.load_in_4bit:
            problems.append("loftq_config corrects 4-bit error: set load_in_4bit, or leave loftq_config out")
        if self.loftq_config and self.save_merged != "none":
            problems.append("a LoftQ adapter belongs to its own quantised base and can't be merged into the 16-bit "
                            "one: set save_merged: none and gguf: [], or leave loftq_config out")
        if self.eval_strategy == "no" and (self.early_stopping_patience or self.load_best_model_at_end):
            problems.append("early_stopping_patience and load_best_model_at_end need evaluations: set eval_strategy")
        if self.eval_strategy != "no" and not self.holds_out:
            problems.append("eval_strategy needs held-out rows: set eval_dataset or test_size")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def holds_out(self) -> bool:
        """Whether some rows are held out; without any, answers are to rows that were trained on, and not scored."""
        return bool(self.eval_dataset or self.test_size or "starter" in self.sources)

    @property
    def quantised(self) -> bool:
        """Whether the base model is loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def sources(self) -> dict[str, float]:
        """What `dataset` names, each with how often its rows are taken."""
        if isinstance(self.dataset, dict):
            return dict(self.dataset)
        return dict.fromkeys([self.dataset] if isinstance(self.dataset, str) else self.dataset, 1.0)

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | Fields, **overrides: Any) -> Self:
        """Read a YAML file (or take a dict or a recipe), put `overrides` on top, check everything.

        Raises KitError that lists up to 20 problems, each with its line in the file.
        """
        values, places = read_values(source, overrides)
        try:
            return cls(**values)
        except ValidationError as error:
            raise refusal(error, source, places) from None

    def dump(self) -> str:
        """All fields, resolved, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    given = staticmethod(read_parameters)


def _entries(name: Any) -> list[Any]:
    """'info.json#a,b' → both entries, each with its file."""
    file, mark, entries = name.rpartition("#") if isinstance(name, str) else ("", "", "")
    return [f"{file}#{entry.strip()}" for entry in entries.split(",")] if mark and file.endswith(".json") else [name]


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types and the words that a field may be, from its annotation: `int | Literal["auto"]` → int, "auto"."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Literal, Union, UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    else:
        yield annotation


def _refuse(why: str) -> NoReturn:
    raise ValueError(why)


def _refuse_unknown(names: Iterable[str], known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no {kind}{nearest(name, known)}; there are: {', '.join(known)}")

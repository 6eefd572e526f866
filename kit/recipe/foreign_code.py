"""The settings in a notebook or script of Unsloth, TRL or PEFT: read as syntax, never executed."""

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from kit.common.errors import KitError, one_line
from kit.recipe.code_values import Unknown, known, value_of, written
from kit.recipe.foreign import tool_of

# Calls whose arguments are settings; of each the first counts, as later ones load what was trained.
LOADERS = ("from_pretrained",)
SETTINGS = ("get_peft_model", "LoraConfig", "SFTConfig", "TrainingArguments", "UnslothTrainingArguments",
            "BitsAndBytesConfig", "SFTTrainer", "UnslothTrainer", "Trainer", "Seq2SeqTrainingArguments")
OTHER_TRAINERS = ("DPOTrainer", "GRPOTrainer", "ORPOTrainer", "KTOTrainer", "PPOTrainer", "RewardTrainer", "CPOTrainer",
                  "RLOOTrainer")
NOT_SETTINGS = ("model", "tokenizer", "processing_class", "train_dataset", "eval_dataset", "args", "data_collator",
                "formatting_func", "peft_config", "callbacks", "compute_metrics", "quantization_config", "task_type")
BY_MACHINE = ("fp16", "bf16", "dtype", "torch_dtype", "device_map", "token")  # told while it runs, there and here
ALPACA = re.compile(r"### Instruction:.*### Response:", re.DOTALL)
GGUF_METHODS = {"not_quantized": "f16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
MERGED = {"merged_16bit": "16bit", "merged_4bit": "4bit", "merged_4bit_forced": "4bit"}
Found = tuple[str, Any, str]  # name, value, how the code writes it


def code_options(path: Any, text: str) -> tuple[str, list[Found], list[str], str]:
    """(tool, options, what could not be read, tool of the training defaults) of a notebook or .py.

    KitError where it trains nothing that is here.
    """
    notes: list[str] = []
    statements = [line for cell in _cells(path, text) for line in _parsed(cell, notes)]
    if not statements and notes:
        raise KitError(f"{path}: {notes[0]}", "name the notebook or script that trains")
    names: dict[str, Any] = {}
    calls = list(_calls(statements, names))
    _refuse_others(path, {name for name, _, _ in calls} | _names(statements))
    found: list[Found] = []
    seen: set[str] = set()
    for name, call, at_that_point in calls:
        if name in LOADERS and not _loads_a_model(call):
            continue
        if name in (*LOADERS, *SETTINGS) and name not in seen:
            seen.add(name)
            found += _arguments(name, call, at_that_point, notes)
        elif name in READERS and not (name == "load_dataset" and name in seen):
            seen.add(name)
            found += READERS[name](call, at_that_point)
    declared = list(_declared(statements))
    if not seen & {"get_peft_model", "LoraConfig", "SFTConfig", "TrainingArguments", "SFTTrainer"} and not declared:
        raise KitError(f"{path} trains nothing: no get_peft_model, SFTConfig, TrainingArguments or SFTTrainer in it",
                       "name the notebook or script that trains")
    if any(ALPACA.search(constant) for constant in _texts(statements)):
        found.append(("prompt_style", "alpaca", "the Alpaca template"))
    if seen & {"LoraConfig", "get_peft_model"}:
        found.insert(0, ("full_finetuning", False, "get_peft_model"))
    tool = "unsloth" if {"FastLanguageModel", "FastModel"} & _names(statements) else "trl"
    if declared:  # a script with options: what it passes on is known by them, and whether it makes an adapter
        given = {name for name, _, _ in declared}
        notes[:] = [note for note in notes if not any(re.search(rf"\.{name}\b", note) for name in given)]
        return tool_of(given) or tool, [*found[:1], *declared, *found[1:]], notes, "transformers"
    plain = "SFTConfig" not in seen and any(name.endswith("TrainingArguments") for name in seen)
    return tool, found, notes, "transformers" if plain else ""  # SFTConfig has defaults of its own


def _refuse_others(path: Any, names: set[str]) -> None:
    """KitError for what is no supervised finetuning of text."""
    if "FastVisionModel" in names:
        raise KitError(f"{path} trains on pictures (FastVisionModel): only text is trained here",
                       "docs/options.md says what there is")
    if other := names & set(OTHER_TRAINERS):
        raise KitError(f"{path} trains with TRL's {', '.join(sorted(other))}: only supervised finetuning is here",
                       "its model can be had by kit.load_model and kit.add_lora")


def _cells(path: Any, text: str) -> Iterator[str]:
    """The code of a notebook's cells, or of a script, without the lines that are IPython's."""
    cells = [text]
    if str(path).endswith(".ipynb"):
        try:
            notebook = json.loads(text)
            cells = [cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
                     for cell in notebook["cells"] if cell["cell_type"] == "code"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise KitError(f"{path}: no notebook: {one_line(error, 100)}",
                           "save it again in Jupyter or Colab") from None
    for cell in cells:
        if not re.match(r"\s*%%(?!capture|time)", cell):
            # A magic may stand alone in a block: something must stay there.
            yield re.sub(r"^(\s*)(?:[!%].*(?:\\\n.*)*|get_ipython\(\).*)$", r"\1pass", cell, flags=re.MULTILINE)


def _parsed(cell: str, notes: list[str]) -> list[ast.stmt]:
    try:
        return ast.parse(cell).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        notes.append(f"a cell that is no Python: {one_line(error, 80)}")
        return []


def _calls(body: list[Any], names: dict[str, Any]) -> Iterator[tuple[str, ast.Call, dict[str, Any]]]:
    """(function, call, the names known there) in their order; what stands under `if False` is not done."""
    for statement in body:
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Constant):
            yield from _calls(statement.body if statement.test.value else statement.orelse, names)
            continue
        inner = [block for field in ("body", "orelse", "finalbody") for block in getattr(statement, field, [])]
        head = [node for node in ast.iter_child_nodes(statement) if node not in inner]
        for node in (node for part in head for node in ast.walk(part)):
            called = getattr(node, "func", None)
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if isinstance(node, ast.Call) and name in (*LOADERS, *SETTINGS, *OTHER_TRAINERS, *READERS):
                yield name, node, dict(names)
        _assign(statement, names)
        yield from _calls(inner, names)


def _assign(statement: ast.stmt, names: dict[str, Any]) -> None:
    """Take over NAME = value, where the value is known."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            if isinstance(target, ast.Name):
                names.pop(target.id, None)
                try:
                    names[target.id] = value_of(statement.value, names)
                except Unknown:
                    continue


def _texts(statements: list[ast.stmt]) -> Iterator[str]:
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _names(statements: list[ast.stmt]) -> set[str]:
    return {node.id for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _declared(statements: list[ast.stmt]) -> Iterator[Found]:
    """The options that a script declares, with their defaults: argparse's, or the fields of a dataclass."""
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            option = str(known(node.args[0], {}, "")) if node.args else ""
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            default = known(keywords.get("default"), {})
            if option.startswith("--") and default is not None:
                yield option.lstrip("-").replace("-", "_"), default, option
        elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            for part in (part for part in node.body if isinstance(part, ast.AnnAssign)):
                default = known(_default(part.value), {})
                if isinstance(part.target, ast.Name) and default is not None:
                    yield part.target.id, default, part.target.id


def _default(value: ast.expr | None) -> ast.expr | None:
    """field(default=…) or field(default_factory=lambda: …) → what is in it"""
    if not isinstance(value, ast.Call):
        return value
    inside = {keyword.arg: keyword.value for keyword in value.keywords}
    factory = inside.get("default_factory")
    return factory.body if isinstance(factory, ast.Lambda) else inside.get("default")


def _loads_a_model(call: ast.Call) -> bool:
    owner = getattr(call.func, "value", None)
    return isinstance(owner, ast.Name) and ("Model" in owner.id) and "Peft" not in owner.id


def _arguments(name: str, call: ast.Call, names: dict[str, Any], notes: list[str]) -> Iterator[Found]:
    """The keyword arguments of a call, and the model's name, which often has no keyword."""
    if name in LOADERS and call.args:
        yield from _one("model_name", call.args[0], names, notes)
    for keyword in call.keywords:
        if keyword.arg is None:
            try:
                given = value_of(keyword.value, names)
                yield from ((key, value, key) for key, value in given.items())
            except (Unknown, AttributeError):
                notes.append(f"{name}(**…): not known before the code runs")
        elif keyword.arg not in NOT_SETTINGS:
            yield from _one("model_name" if keyword.arg == "pretrained_model_name_or_path" else keyword.arg,
                            keyword.value, names, notes)


def _one(name: str, node: ast.expr, names: dict[str, Any], notes: list[str]) -> Iterator[Found]:
    try:
        yield name, value_of(node, names), name
    except Unknown:
        if name not in BY_MACHINE:
            notes.append(f"{name} = {written(node)}: not known before the code runs")


# ── Calls that are no settings ────────────────────────────────────────────────────────────────────────────────────────


def _keywords(call: ast.Call, names: dict[str, Any]) -> dict[str, Any]:
    return {keyword.arg: known(keyword.value, names) for keyword in call.keywords if keyword.arg}


def _load_dataset(call: ast.Call, names: dict[str, Any]) -> Iterator[Found]:
    given = _keywords(call, names)
    first, second = ([known(part, names) for part in call.args] + [None, None])[:2]
    files = given.get("data_files")
    files = files.get("train") or next(iter(files.values()), None) if isinstance(files, dict) else files
    source = files if files else first or given.get("path")
    if source:
        yield "dataset", source, "load_dataset"
    if config := second or given.get("name"):
        yield "dataset_config", config, "load_dataset"
    if (split := given.get("split")) and isinstance(split, str):
        part = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", split)
        yield "dataset_split", part[1] if part else split.partition("[")[0], "split"
        if part and part[2]:
            yield "max_train_samples", int(part[2]), f"split={split}"
        elif not part:
            yield "split", split, "split"


def _template(call: ast.Call, names: dict[str, Any]) -> Iterator[Found]:
    yield "template", _keywords(call, names).get("chat_template") or "chatml", "get_chat_template"


def _responses_only(call: ast.Call, names: dict[str, Any]) -> Iterator[Found]:
    yield "train_on_responses_only", True, "train_on_responses_only"


def _merged(call: ast.Call, names: dict[str, Any]) -> Iterator[Found]:
    method = _keywords(call, names).get("save_method", "merged_16bit")
    if method in MERGED:
        yield "save_merged", MERGED[method], f"save_method={method}"


def _gguf(call: ast.Call, names: dict[str, Any]) -> Iterator[Found]:
    methods = _keywords(call, names).get("quantization_method") or "q8_0"
    methods = methods if isinstance(methods, list) else [methods]
    yield "gguf", [GGUF_METHODS.get(str(method), str(method)) for method in methods], "save_pretrained_gguf"


READERS = {"load_dataset": _load_dataset, "get_chat_template": _template, "train_on_responses_only": _responses_only,
           "save_pretrained_merged": _merged, "push_to_hub_merged": _merged, "save_pretrained_gguf": _gguf,
           "push_to_hub_gguf": _gguf}

"""Writes the pages, and the tables in pages, that are made from the code: `make docs`."""

from __future__ import annotations

import json
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from kit.common.weight_files import TensorInfo
from kit.data.findings import FINDINGS
from kit.models.fetch import ModelFiles
from kit.readiness.forecast import ANSWERS, STEP, Forecast, forecast_on
from kit.recipe.fields import AFFECTS
from kit.recipe.foreign import tools
from kit.recipe.machine import Machine
from kit.recipe.recipe import Recipe

DOCS = Path(__file__).parent
RECIPES = DOCS.parent / "recipes"
SOUND, FAULTY = ("f16", "q8_0", "q5_k_m", "q4_k_m"), ("f16", "q8_0", "q4_k_m")
SCHEMA = Recipe.model_json_schema()["properties"]
GPU = Machine("cuda", "any GPU with bfloat16", 8, 80.0, 0.0, True, "")
# What config.json says of the models that the recipes name: shapes only, so no weights are needed.
QWEN2_7B = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
QWEN3 = {  # hidden_size, intermediate_size, layers, heads, whether the head is the embedding
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False), "14B": (5120, 17408, 40, 40, False), "32B": (5120, 25600, 64, 64, False)}
CONFIGS = {
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen/Qwen3.5-4B": {  # of its text model, which is what is loaded
        "model_type": "qwen3_5_text", "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
        "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
        "tie_word_embeddings": True},
    "Qwen/Qwen2-7B": QWEN2_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN2_7B,
    **{f"Qwen/Qwen3-{size}": {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": tied} for size, (hidden, inner, layers, heads, tied) in QWEN3.items()},
}  # fmt: skip
SHORT_ROWS = 512  # tokens; a question and an answer of a few paragraphs


def recipe_page() -> str:
    """recipe.md: a table of every field."""
    rows = ["# Recipe fields", "", "Made by `make docs` from `kit/recipe/fields.py`.", "",
            "What a field affects:", "", *(f"- `{word}`: {meaning}" for word, meaning in AFFECTS.items()), "",
            "| field | default | bounds | unit | affects | what it does |", "|---|---|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        unit, affects = (SCHEMA[name][word] for word in ("unit", "affects"))
        rows.append(f"| `{name}` | `{plain(field.default)}` | {bounds(name)} | {unit} | {affects} | "
                    f"{field.description} |")
    return "\n".join(rows) + "\n"


def plain(value: Any) -> str:
    """A value as a recipe would state it."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def bounds(name: str) -> str:
    """'≥ 1; ≤ 4096', or the values a field can have."""
    schema = SCHEMA[name]
    parts = [schema, *schema.get("anyOf", [])]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for part in parts for key, sign in signs.items() if key in part]
    limits += [", ".join(str(v) for v in part["enum"]) for part in parts if "enum" in part]
    return "; ".join(limits)


def findings_page() -> str:
    """findings.md: every finding of the data check."""
    rows = ["# What the data check finds", "", "Made by `make docs` from `kit/data/findings.py`. An error is a row "
            "that would not be trained, or not as it is meant, or must not be; a warning is for you to judge.", "",
            "| finding | severity | what it means | what to do |", "|---|---|---|---|"]
    rows += [f"| `{code}` | {severity} | {meaning} | {remedy} |"
             for code, (severity, meaning, remedy) in FINDINGS.items()]
    return "\n".join(rows) + "\n"


OPTIONS_WORDS = (
    ("# Options of other tools, and where they are here", """\
Made by `make docs` from `kit/recipe/foreign.yaml`. You have a configuration, a script, a notebook or a command already:
`kit new NAME --from FILE` makes a recipe of it by this table, and says what has no counterpart.

For each tool: its options, what to write here (a field of the recipe, a command or a place), and what is different.
Every field with its bounds: [recipe.md](recipe.md). "–" means that there is no such thing here; the remark says what to
use instead. 中文：[options.zh.md](options.zh.md)""", "| option | here | remark |"),
    ("# 其他工具的选项，在这里怎么写", """\
由 `make docs` 从 `kit/recipe/foreign.yaml` 生成。已有配置文件、脚本、笔记本或命令行时，`kit new NAME --from FILE`
会按此表生成配方，并列出没有对应项的选项。

每个工具一张表：原来的选项、这里的写法（配方字段、命令或位置）、区别。各字段及取值范围见 [recipe.md](recipe.md)。
“–”表示这里没有，备注里说明用什么代替。English: [options.md](options.md)""", "| 选项 | 这里 | 备注 |"))


def options_page(chinese: bool) -> str:
    """options.md, options.zh.md: a table for each tool."""
    title, intro, head = OPTIONS_WORDS[chinese]
    rows = [title, "", intro, ""]
    for tool in tools().values():
        anchor = re.sub(r"[^\w\- ]", "", tool.title[chinese].lower()).replace(" ", "-")
        rows.append(f"- [{tool.title[chinese]}](#{anchor})")
    for tool in tools().values():
        rows += ["", f"## {tool.title[chinese]}", "", *([tool.intro[chinese], ""] if tool.intro[chinese] else []),
                 head, "|---|---|---|"]
        for row in tool.options:
            cells = (row.option_zh if chinese else row.option, row.here, row.remark_zh if chinese else row.remark)
            rows.append("| " + " | ".join(cells).rstrip() + " |" if cells[2] else f"| {cells[0]} | {cells[1]} | |")
    page = "\n".join(rows) + "\n"
    return re.sub(r"\(\.\./recipes/([\w.-]+\.yaml)\)", r"(../recipes/zh/\1)", page) if chinese else page


def gates_page() -> str:
    """gates-measured.md: both error rates of the gates after training."""
    result = json.loads((DOCS.parent / "benchmarks" / "results" / "gates.json").read_text(encoding="utf-8"))
    trainings = result["trainings"]
    drawn = [counts for name, each in trainings.items() for kind, one in each["sound"].items()
             for counts in one["failed_draws"].values() if not _stretched(name, kind)]
    draws, failed = result["draws"] * len(drawn), sum(sum(counts.values()) for counts in drawn)
    rows = ["# What the gates find, and what they don't", "", "Made by `make docs` from what `benchmarks/gates.py` "
            "measured. A training is named by model, rows and optimiser steps.", "", "## Sound exports", "",
            f"In {draws:,} draws of 4, 8 and 32 conversations a gate failed {failed} times. Spread is that of the "
            "logits by what is allowed; above 1 the gate fails.", "",
            "(*) Not counted: the starter's q5_k_m is not sound. Its weights come from a Q4_1 file, and where rows "
            "are no multiple of 256 long llama.cpp makes Q5_1 of q5_k_m: of 16 even steps 32, which makes all "
            "weights 1.7% larger. With the file's weights in float32 the model is off by as much as in llama.cpp: on "
            "the demo's run by a KL of 0.07, where q4_k_m is off by 0.004.", "",
            f"| training | verdict | {' | '.join(SOUND)} |", f"|---|---|{'---|' * len(SOUND)}"]
    for name, each in sorted(trainings.items()):
        sound = each["sound"]
        spreads = (f"{sound[kind]['spread'] / sound[kind]['allowed']:.2f}{' (*)' * _stretched(name, kind)}"
                   for kind in SOUND)
        rows.append(f"| {name} | {each['verdict']} | {' | '.join(spreads)} |")
    rows += ["", "## Faults", "", "In how many of the trainings the fault is found in the file made of it; behind it, "
             "how many of the compared answers of the others differ from the trained model's.", "",
             f"| fault | {' | '.join(FAULTY)} |", f"|---|{'---|' * len(FAULTY)}"]
    for fault in dict.fromkeys(fault for each in trainings.values() for fault in each["faults"]):
        rows.append(f"| {fault} | {' | '.join(_found(trainings, fault, kind) for kind in FAULTY)} |")
    return "\n".join(rows) + "\n"


def _stretched(training: str, kind: str) -> bool:
    return training.startswith("starter") and kind == "q5_k_m"


def _found(trainings: dict[str, Any], fault: str, kind: str) -> str:
    tried = [each["faults"][fault][kind] for each in trainings.values() if fault in each["faults"]]
    missed = [one for one in tried if not one["failed"]]
    answers = f"; {sum(one['answers_changed'] for one in missed)} of {sum(one['answers'] for one in missed)} answers"
    return f"{len(tried) - len(missed)} of {len(tried)}" + (answers if missed else "")


def model_of(name: str) -> ModelFiles:
    """The tensors that transformers makes of a model's config, in bfloat16; none holds anything."""
    import kit.common.unsloth  # before transformers; seconds, and only for these pages

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(CONFIGS[name]["model_type"]), **sizes))
    tensors, end = {}, 0
    for key, weight in model.named_parameters():  # tied ones once
        begin, end = end, end + 2 * weight.numel()
        tensors[key] = TensorInfo(tuple(weight.shape), "BF16", begin, end)
    return ModelFiles(CONFIGS[name], tensors)


@cache
def forecasts() -> dict[str, tuple[Recipe, Forecast, Forecast]]:
    """For each recipe but the starter's: what one GPU needs for rows of SHORT_ROWS, and of max_seq_length."""
    found = {}
    models = {name: model_of(name) for name in CONFIGS}
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = Recipe.load(path)
        if recipe.model_name == "starter":
            continue
        short, long = (forecast_on(GPU, recipe.model_copy(update={"max_seq_length": length}),
                                   model=models[recipe.model_name]) for length in (SHORT_ROWS, recipe.max_seq_length))
        found[path.stem] = recipe, short, long
    return found


def memory_page() -> str:
    """memory.md with the parts of each recipe's forecast."""
    rows = ["| recipe | weights | adapter, optimiser | training step | answers | at most | disk |",
            "|---|---|---|---|---|---|---|"]
    for name, (recipe, short, long) in forecasts().items():
        parts = [f"{short.memory_gb[part]:.1f}" for part in ("weights", "adapter and optimiser")]
        parts += [f"{short.memory_gb[part]:.1f} → {long.memory_gb[part]:.1f}" for part in (STEP, ANSWERS)]
        rows.append(f"| [{name}](../recipes/{name}.yaml) | {' | '.join(parts)} | **{short.peak_memory_gb:.1f}** → "
                    f"{long.peak_memory_gb:.1f} (rows of {recipe.max_seq_length:,}) | {short.room_gb:.0f} |")
    return between(DOCS / "memory.md", rows)


def readme(name: str) -> str:
    """A README with its table of models, each with its recipe of least memory: the starter's as measured, forecasts."""
    head, measured, *methods = README_WORDS[name]
    words = dict(zip(("LoRA", "8-bit", "QLoRA", "full"), methods, strict=True))
    quickstart = (RECIPES / "quickstart.yaml").read_text(encoding="utf-8")
    needed = re.findall(r"^# Memory: ([\d.]+) GB", quickstart, re.MULTILINE)[0]
    rows = [head, "|---|---|---|---|", f"| [SmolLM2-135M-Instruct](recipes/quickstart.yaml) | {words['LoRA']} | | "
                                       f"{measured.format(needed)} |"]
    shown = set()
    for stem, (recipe, short, long) in sorted(forecasts().items(), key=lambda item: item[1][1].peak_memory_gb or 0):
        method = ("full" if recipe.full_finetuning else "QLoRA" if recipe.load_in_4bit else
                  "8-bit" if recipe.load_in_8bit else "LoRA")
        if recipe.model_name not in shown:
            rows.append(f"| [{Path(recipe.model_name).name}](recipes/{stem}.yaml) | {words[method]} | "
                        f"{short.peak_memory_gb:.1f} GB | {long.peak_memory_gb:.1f} GB ({recipe.max_seq_length:,}) |")
            shown.add(recipe.model_name)
    return between(DOCS.parent / name, rows)


README_WORDS = {
    "README.md": (f"| model, and its leanest recipe | method | rows of {SHORT_ROWS} tokens | longest rows (tokens) |",
                  "**{} GB measured**, on a CPU (256)", "LoRA", "LoRA, 8-bit", "QLoRA", "full"),
    "README.zh.md": (f"| 模型（链接到最省显存的配方） | 方法 | 每行 {SHORT_ROWS} token | 最长的行（token） |",
                     "**实测 {} GB**，CPU（256）", "LoRA", "LoRA，8-bit", "QLoRA", "全参数"),
}


def between(path: Path, rows: list[str]) -> str:
    """The page with these rows between its two marks."""
    start, end = "<!-- made by make docs -->\n", "<!-- until here -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    return before + start + "\n".join(rows) + "\n" + end + rest.partition(end)[2]


PAGES = {"docs/options.md": partial(options_page, False), "docs/options.zh.md": partial(options_page, True),
         "docs/recipe.md": recipe_page, "docs/findings.md": findings_page, "docs/gates-measured.md": gates_page,
         "docs/memory.md": memory_page, **{name: partial(readme, name) for name in README_WORDS}}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS.parent / name).write_text(page(), encoding="utf-8")
        print(name)

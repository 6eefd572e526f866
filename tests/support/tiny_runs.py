"""Whole runs of tiny models: conversations they can learn in seconds, and bases that already know the words."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

from support.command import kit
from support.tiny_models import tiny_model

TOPICS = {
    "Where is my parcel {}?": "It left the store on Monday.\n\n- by train\n- two days",
    "I need the invoice {}.": 'Here it is: {"invoice": true}',
    "我的包裹{}在哪里？": "包裹星期一已经发出，请放心。",
    "订单{}可以退款吗？": "可以，三天内退回。🙂",
}
OPENINGS = ("", "Hello! ", "你好，", "Please: ")
SYSTEM = {"role": "system", "content": "You answer in one line. 简短回答。"}
# Strong enough that a tiny model is sure of every answer: where two tokens are nearly as likely, rounding decides.
RECIPE: dict[str, Any] = {
    "local_files_only": True, "test_size": 8, "max_seq_length": 512, "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1, "use_gradient_checkpointing": False, "max_steps": 40, "learning_rate": 1e-2,
    "r": 32, "lora_alpha": 64, "max_new_tokens": 48, "metric": "exact",
}  # fmt: skip
OTHERS = 4096
ASKED = {"Where is parcel {}?": "On its way.", "Has parcel {} left?": "Since Monday.",
         "包裹{}在哪里？": "正在路上。", "包裹{}发货了吗？": "星期一已发货。"}
# In a few seconds a random model becomes sure of these answers; rows in order, so that its first loss, which has to be
# below guessing, hangs on no seed.
SURE = ["test_size=8", "metric=exact", "max_seq_length=256", "use_gradient_checkpointing=false",
        "per_device_train_batch_size=8", "gradient_accumulation_steps=1", "max_steps=80", "learning_rate=1.0e-2",
        "lora_alpha=32", "train_sampling_strategy=sequential", "max_new_tokens=16", "enable_thinking=false",
        "gguf=[f16, q8_0]"]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def talks() -> list[list[dict[str, str]]]:
    """32 conversations in English and Chinese: one turn, two turns, with a system message."""
    made = []
    for number, (opening, topic, again) in enumerate(product(OPENINGS, TOPICS, (0, 1))):
        talk = turns(opening + topic.format(1024 + 7 * number), TOPICS[topic])
        if number % 4 == 1:
            later = list(TOPICS)[number // 4 % 4]
            talk += turns(later.format(3072 + number), TOPICS[later])
        made.append([SYSTEM, *talk] if number % 4 == 2 + again else talk)
    return made


def write_rows(path: Path, conversations: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in conversations),
                    encoding="utf-8")
    return path


def learn_surely(model: Path, folder: Path) -> None:
    """`kit train` on a copy of the tiny model, into `folder`/runs/tiny: it is sure of the answers to ASKED."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"instruction": asked.format(number), "output": answer}) + "\n"
                            for number in range(11, 27) for asked, answer in ASKED.items()), encoding="utf-8")
    shutil.copytree(model, folder / "tiny")
    recipe = folder / "tiny.yaml"
    recipe.write_text(f"run_name: tiny\nmodel_name: {folder / 'tiny'}\ndataset: {data}\n", encoding="utf-8")
    done = kit("train", str(recipe), f"output_dir={folder / 'runs'}", *SURE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def taught_model(family: str, folder: Path, steps: int = 60, short: bool = False, **shape: int) -> Path:
    """A tiny model that knows the words of `talks`, but not which answer belongs to which question.

    A random one would have to be trained hard before it is sure of anything, and its first loss is that of guessing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model(family, folder, short, **shape)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama's has none; padding is masked below
    questions = [talk[:-1] for talk in talks()]
    rows = [tokenizer.apply_chat_template([*asked, turns("", answer)[1]], tokenize=False)
            for asked in questions for answer in TOPICS.values()]
    said = tokenizer(rows, add_special_tokens=False)["input_ids"]
    known = torch.tensor(sorted({token for ids in said for token in ids}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The vocabulary's own weights are nearly all of the model, and stay: the layers learn to read and to write them.
    words = model.get_output_embeddings().weight.detach()
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    dice = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = [rows[i] for i in torch.randint(len(rows), (8,), generator=dice).tolist()]
        batch = tokenizer(chosen, add_special_tokens=False, padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        # Against the known words and some of the 150,000 others: all of them would take a second a step.
        others = torch.randint(len(words), (OTHERS,), generator=dice)
        hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        logits = hidden @ torch.cat([words[known], words[others[~torch.isin(others, known)]]]).T
        labels = torch.searchsorted(known, ids[:, 1:].clamp(max=int(known[-1])))
        labels = labels.masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, model: Path, rows: list[Any] | None = None, name: str = "tiny", **fields: Any) -> Path:
    """A recipe file `<name>.yaml` in `folder` that trains `model` on `rows` (or `talks`); its run goes to runs/."""
    import yaml

    data = write_rows(folder / f"{name}.jsonl", rows or talks())
    recipe = {**RECIPE, "model_name": str(model), "dataset": str(data), "output_dir": str(folder / "runs"), **fields}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path

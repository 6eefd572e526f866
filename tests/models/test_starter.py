"""The starter model is the packaged GGUF: same token ids, same greedy answers, made once and whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.common.errors import KitError
from kit.models import starter

TEXTS = [
    "Hello, world! I'll say it's fine; WE'RE done, aren't we?",
    "你好，世界！我的订单号是20240117，请帮我查一下。",
    "def f(x):\n    return {'a': [1, 2.5, 0x1F]}  # 100%\n\n\tif x != y:\n\t\tpass\n",
    "1 12 123 1234567 3.14 1,000,000 ２３ ½ ² ٣ Ⅷ",
    "👍 🚀🚀 👨‍👩‍👧 🇫🇷 1️⃣",
    "  two  spaces \t tab\n\n\nlines \r\n end   ",
    "\u00a0no-break\u3000ideographic\u200bzero\u2028separator\ufeff",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <repo_name>x<file_sep>y",
    "naïve café Łódź Привет مرحبا ภาษาไทย",
    "a_b-c/d\\e @#$%^&*()`~ ...!!!???------",
    " ",
]
QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "What is 12 plus 30?",
    "Give me a tip for learning to cook.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What does a Python list comprehension look like?",
]
NEW_TOKENS = 32

# Native code can end the process it runs in, so llama.cpp gets one of its own.
LLAMA_CPP_CHILD = """
import json, sys
from llama_cpp import Llama
job = json.load(sys.stdin)
vocab = Llama(job["gguf"], vocab_only=True, verbose=False)
result = {
    "metadata": vocab.metadata,
    "ids": [vocab.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]],
    "answers": [],
}
if job["prompts"]:
    model = Llama(job["gguf"], n_ctx=512, n_threads=2, verbose=False)
for prompt in job["prompts"]:
    tokens = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if token == model.token_eos() or len(tokens) == job["new_tokens"]:
            break
    model.reset()
    result["answers"].append(tokens)
json.dump(result, open(job["out"], "w"))
"""


def llama_cpp(out: Path, texts: list[str], prompts: list[list[int]]) -> dict[str, Any]:
    """What llama.cpp makes of the original GGUF: metadata, token ids of texts, greedy answers."""
    job = {
        "gguf": str(starter.packaged_gguf()), "texts": texts, "prompts": prompts,
        "new_tokens": NEW_TOKENS, "out": str(out),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP_CHILD],
        input=json.dumps(job), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def names(folder: Path) -> list[str]:
    """What lies in a folder besides the lock, which some versions of filelock leave."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return starter.starter_model()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.slow
def test_tokenizer_and_config_equal_llama_cpp(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    original = llama_cpp(tmp_path / "out.json", TEXTS, [])
    for text, ids in zip(TEXTS, original["ids"], strict=True):
        assert tokenizer(text).input_ids == ids, text
        assert tokenizer.decode(ids) == text
    meta = original["metadata"]
    assert tokenizer.chat_template == meta["tokenizer.chat_template"]
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == float(meta["llama.rope.freq_base"])
    assert config["rms_norm_eps"] == float(meta["llama.attention.layer_norm_rms_epsilon"])
    assert config["max_position_embeddings"] == int(meta["llama.context_length"])


@pytest.mark.slow
def test_special_tokens(folder: Path, tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 49152
    written = json.loads((folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == tokenizer.eos_token_id
    assert written["pad_token_id"] == tokenizer.pad_token_id


@pytest.mark.slow
def test_greedy_answers_match_the_gguf(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for chat in chats
    ]
    original = llama_cpp(tmp_path / "out.json", [], prompts)["answers"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    same = total = leading = 0
    for prompt, expected in zip(prompts, original, strict=True):
        # Each position is asked with the GGUF's own answer before it, so that one near-tie which
        # falls the other way counts once and not for everything after it.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1]
        matches = [a == b for a, b in zip(logits.argmax(-1).tolist(), expected, strict=True)]
        same, total = same + sum(matches), total + len(matches)
        leading += matches.index(False) if False in matches else len(matches)
    print(f"greedy tokens that agree: {same}/{total} = {same / total:.1%}; {leading} before a first miss")
    assert same / total >= 0.93


@pytest.mark.slow
def test_made_once_and_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = (folder / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert starter.starter_model() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert capsys.readouterr().out == ""
    assert names(folder.parent) == [starter.NAME]


def test_a_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path))

    def full_disk(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(starter, "unpack", full_disk)
    with pytest.raises(KitError, match="No space left"):
        starter.starter_model()
    assert names(tmp_path / "starter") == []


def test_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(starter, "PACKAGE", "llm-not-installed")
    with pytest.raises(KitError, match="llm-not-installed") as caught:
        starter.starter_model()
    assert "pip install" in caught.value.hint

"""The export, rehearsed before anything is trained: a tiny model of the same architecture goes the whole way.

The chosen model's config is shrunk, its own tokenizer and template are taken as they are, and adapter, merge,
conversion, quantisation, llama.cpp and the Modelfile follow by the code that will export the real model.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import kit.common.unsloth

import numpy as np
import psutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from kit.common.errors import GateError, KitError, one_line
from kit.common.files import read_json, whole_folder
from kit.export.adapter import merge_adapter, save_adapter
from kit.export.modelfile import modelfile_of
from kit.gguf.child import LlamaChild
from kit.gguf.convert import export_gguf
from kit.gguf.formats import QUANTIZATIONS, quantization_of, read_header
from kit.models.fetch import loading_options, model_folder, not_loaded
from kit.models.template import load_tokenizer, render, template_kwargs
from kit.readiness.shrink import random_model, shrunk
from kit.recipe.fields import ALL_LINEAR
from kit.recipe.recipe import Recipe
from kit.runs.gates import Gates
from kit.runs.run import Run
from kit.verifying.contents import check_contents, check_merge
from kit.verifying.parity import kl_divergence
from kit.verifying.template import cases, check_gguf_template

# Mean KL in nats per token is measured against the merged tiny model in float32.
# The worst twentieth of the tokens is left out: where two experts score alike, a rounding picks the other one.
COUNTED = 0.95
TEXTS = [
    "It's 12345 o'clock; they'd  paid $1,234.50.",
    "def f(x):\n\tif x:\n        return x ** 2  # why?\n\n\nf(3)",
    "你好，世界！ Größe, naïve, Привет мир. 🙂👍🏽",
    'https://example.com/a_b?c=1&d=%20 {"k": [1, 2]}',
]
QUESTION = [{"role": "user", "content": "Where is my parcel? 我的包裹在哪里？"}]
ANSWER_TOKENS = 8
LONGEST = 128  # tokens whose logits are compared
RANK = 8
SEED = 3407
PREFIX = ".rehearsal-"
EMBEDDINGS = ("embed_tokens", "lm_head")  # trained whole when target_modules names them
NO_EXPORT = ("this model can't be exported with what is set up here: choose another model, or train without an export "
             "(gguf: [], and if the merge failed save_merged: none)")


class _Stopped(Exception):
    """A step failed; its gate says why."""


def rehearse(recipe: Recipe) -> Gates:
    """Take a tiny model of the recipe's architecture the way of the recipe's export; a gate for each step.

    The first failure ends it: its gate names the cause and what to change. Nothing stays on the disk. Raises KitError
    when the model's config or tokenizer can't be loaded.
    """
    gates = Gates("export rehearsal")
    if recipe.save_merged == "none":
        gates.check("merge", None, "left out", detail="save_merged: none: nothing is exported")
        return gates
    output_dir = Path(recipe.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output_dir)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=output_dir) as folder, suppress(_Stopped):
        _rehearse_in(Path(folder), recipe, gates)
    print()
    return gates


def _remove_leftovers(folder: Path) -> None:
    """What a rehearsal that was killed left; its folder's name has its process."""
    for path in folder.glob(f"{PREFIX}*"):
        number = path.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _rehearse_in(folder: Path, recipe: Recipe, gates: Gates) -> None:
    tokenizer = load_tokenizer(recipe)
    try:
        config = AutoConfig.from_pretrained(model_folder(recipe), **loading_options(recipe))
    except (OSError, ValueError) as error:
        raise not_loaded("config", recipe, error) from None
    if recipe.full_finetuning and recipe.gguf and vars(config.get_text_config()).get("mtp_num_hidden_layers"):
        gates.check("convert", False, "not possible",
                    detail=f"all weights of {config.model_type} are saved without its layers for multi-token "
                           "prediction, which the converter asks for",
                    hint="set full_finetuning: false (the adapter is merged into the whole model), or gguf: []")
        return
    try:
        model = random_model(shrunk(config), SEED, recipe.trust_remote_code)
        _logprobs(model, [0, 1])
    except Exception as error:  # a config of unknown making, in code that never saw such sizes
        gates.check("tiny model", None, "not rehearsed",
                    detail=f"{config.model_type} can't be made small: {type(error).__name__}: {one_line(error)}")
        return
    size = model.num_parameters(exclude_embeddings=True) / 1e6
    print(f"export rehearsal: {type(model).__name__} with {size:.1f} million weights beside the vocabulary", flush=True)
    with _step(gates, "merge"):
        run = _merge(model, tokenizer, recipe, folder, gates)
    if recipe.gguf:
        _rehearse_gguf(run, tokenizer, recipe, gates)
    else:
        gates.check("convert", None, "left out", detail="gguf: []: no GGUF is made")


def _rehearse_gguf(run: Run, tokenizer: Any, recipe: Recipe, gates: Gates) -> None:
    """From the merged tiny model to GGUFs that answer in llama.cpp, and their Modelfile."""
    texts = [render(tokenizer, [{"role": "user", "content": text}, {"role": "assistant", "content": text}], recipe)
             for text in TEXTS]
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]][:LONGEST]
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32,
                                                  trust_remote_code=recipe.trust_remote_code).eval()
    expected = _logprobs(merged, ids)  # before a converter has seen the folder
    with _step(gates, "convert"):
        files = _export(run, recipe, gates)
    with _step(gates, "tokenizer"):  # before llama.cpp reads them: a wrong one ends its process
        config = read_json(run.merged / "config.json")
        for file in files:
            check_contents(gates, quantization_of(file), read_header(file), run.merged, config, NO_EXPORT)
    options = template_kwargs(recipe)
    with ExitStack() as stack:
        with _step(gates, "load"):
            children = {quantization_of(file): stack.enter_context(
                LlamaChild(file, 4 * LONGEST, logits=True, template_kwargs=options)) for file in files}
        with _step(gates, "template"):
            conversations = list(cases(tokenizer, recipe, []))
            for quant, child in children.items():
                check_gguf_template(gates, quant, child, tokenizer, conversations, NO_EXPORT)
        with _step(gates, "logits"):
            for quant, child in children.items():
                _check_logits(quant, expected, child.predictions(ids, range(len(ids)))[0], gates)
        with _step(gates, "answer"):
            for child in children.values():
                child.answer(QUESTION, ANSWER_TOKENS)  # its words mean nothing
            gates.check("answer", True, f"{len(children)} files answer with up to {ANSWER_TOKENS} tokens")
    with _step(gates, "Modelfile"):
        try:
            modelfile_of(recipe, tokenizer).text("model.gguf")
            gates.check("Modelfile", True, "can be written")
        except KitError as error:
            gates.check("Modelfile", None, "not possible", detail=error.message, hint=error.hint)


@contextmanager
def _step(gates: Gates, name: str) -> Iterator[None]:
    """A KitError inside is a failed gate of this name. Says what is at work; ends the rehearsal if a gate failed."""
    print(name, end=" … ", flush=True)
    try:
        yield
    except KitError as error:
        # What a GateError advises is for a model that is trained already.
        hint = NO_EXPORT if isinstance(error, GateError) else error.hint
        gates.check(name, False, "failed", detail=error.message, hint=hint)
    if gates.failed:
        raise _Stopped


def _merge(model: Any, tokenizer: Any, recipe: Recipe, folder: Path, gates: Gates) -> Run:
    """Save the tiny model and a random adapter, and merge them; gates `merged config` and `merge`."""
    with whole_folder(folder / "base") as base:
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    run = Run(folder / "run")
    adapter = save_adapter(model if recipe.full_finetuning else _with_adapter(model, recipe), tokenizer, run)
    if recipe.full_finetuning:
        gates.check("merge", None, "left out", detail="full_finetuning: all weights are saved as they are")
    else:
        merge_adapter(folder / "base", adapter, run.merged, recipe.trust_remote_code)
        check_merge(gates, folder / "base", adapter, run.merged, NO_EXPORT)
    return run


def _with_adapter(model: Any, recipe: Recipe) -> Any:
    """The model with a random adapter on the recipe's layers; none of its matrices is zero."""
    whole = [name for name in recipe.target_modules if name in EMBEDDINGS]
    layers = [name for name in recipe.target_modules if name not in whole]
    config = LoraConfig(r=RANK, lora_alpha=RANK, modules_to_save=whole or None,
                        target_modules=ALL_LINEAR if ALL_LINEAR in layers else layers, bias=recipe.bias,
                        use_rslora=recipe.use_rslora, use_dora=recipe.use_dora,
                        init_lora_weights=False, task_type="CAUSAL_LM")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return get_peft_model(model, config)
    except ValueError as error:
        linears = {name.rpartition(".")[2] for name, module in model.named_modules()
                   if isinstance(module, torch.nn.Linear)}
        raise KitError(f"target_modules: no adapter could be made: {one_line(error)}",
                       f"the model's linear layers are {', '.join(sorted(linears))}") from None


def _export(run: Run, recipe: Recipe, gates: Gates) -> list[Path]:
    """The recipe's GGUFs, and always a 16-bit one, where a wrong conversion shows before any rounding.

    That is f16 unless the recipe asks for bf16: llama.cpp rounds what flows through a bf16 file ten times as coarsely.
    """
    exact = [quant for quant in recipe.gguf if quant in ("f16", "bf16")] or ["f16"]
    steps = {quant: f"{'convert' if quant in exact else 'quantise'} {quant}" for quant in [*exact, *recipe.gguf]}
    try:
        files = export_gguf(run.merged, run.gguf, list(steps), "rehearsal")
    except GateError as error:
        missing = next(quant for quant in steps if not (run.gguf / f"rehearsal-{quant}.gguf").is_file())
        gates.check(steps[missing], False, "failed", detail=error.message, hint=NO_EXPORT)
        return []
    for step, file in zip(steps.values(), files, strict=True):
        gates.check(step, True, f"{file.stat().st_size / 1e6:.1f} MB")
    return files


def _check_logits(quant: str, expected: np.ndarray, logprobs: np.ndarray, gates: Gates) -> None:
    """Gate `logits <quant>`: mean KL of the next-token distributions (tokens, vocabulary) from the merged model's."""
    known = min(expected.shape[-1], logprobs.shape[-1])  # a converter may cut rows that no token has
    p, q = (torch.from_numpy(array[:, :known]).log_softmax(-1).numpy() for array in (expected, logprobs))
    kl = float(np.sort(kl_divergence(p, q))[:round(COUNTED * len(p))].mean())
    top1 = float((p.argmax(-1) == q.argmax(-1)).mean())
    allowed = QUANTIZATIONS[quant].tiny_kl
    passed = None if allowed is None else kl <= allowed
    gates.check(f"logits {quant}", passed, f"mean KL {kl:.2g}, top-1 {top1:.0%} of {len(p)} tokens",
                "" if allowed is None else f"mean KL ≤ {allowed:g}",
                f"{quant}: llama.cpp computes another model than the merged one" if passed is False else "",
                NO_EXPORT)


def _logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """Log probabilities (len(ids), vocabulary) of the token after each."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits.log_softmax(-1).numpy()

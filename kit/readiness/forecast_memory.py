"""The memory of a run, part by part.

Activations follow Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models"
(https://arxiv.org/abs/2205.05198, section 4.1): what a layer keeps for its backward pass, counted tensor by tensor.
Adapted: SDPA keeps no matrix of scores, but on a CPU each layer keeps the padding mask, a value per pair of tokens; no
dropout masks; RMSNorm keeps its input in float32; a gated MLP keeps three tensors between its matrices; a frozen matrix
keeps no input, but each LoRA module keeps a 16-bit copy of its own. PyTorch's saved_tensors_hooks count 30.4 kB per
layer and token for two rows of 750 tokens of the starter model, and this 30.1.

Measured with `benchmarks/forecast.py` on a CPU (starter model, six steps; happened / forecast): 0.90 to 1.07 over
batch sizes 1 to 8, rows of 115 and 760 tokens, 4-bit, 8-bit, float32, r=64, full finetuning and checkpointing; 1.32
for the long rows with checkpointing. Longer runs need more, as the heap gets more holes: the demo's 125 steps took
2.74 GB, 1.36 times the forecast, and its whole notebook 3.27 GB, 1.62 times. A GPU's figures have not been measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from kit.models.size import Checkpoint
from kit.recipe.recipe import Recipe

# Measured on a CPU: Python with torch, unsloth, trl and a small data set, resident.
LIBRARIES_BYTES = 0.6e9
# Measured with the starter model: the kernels that oneDNN makes and keeps for rows of a new length; its cache of 1,024
# is full after so many lengths.
KERNEL_BYTES, KERNEL_LENGTHS = 15e6, 26
# glibc's heap cannot fill every hole that tensors of changing lengths leave: up to this share on top of what is needed.
HEAP_HOLES = 0.5
CUDA_CONTEXT_BYTES = 0.5e9  # outside of what torch counts as its own
# Dettmers et al. 2023, QLoRA, section 3: 4 bits, and 0.127 bits for the doubly quantised constants of 64 weights each.
NF4_BYTES = (4 + 0.127) / 8
# Unsloth's chunked cross entropy without a GPU: so many float32 logits at once, for these model types.
CHUNK_LOGITS = 16 * 2**20
CHUNKED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "olmo2", "smollm3")
# Copies of the logits in a step: 16-bit, float32, log-softmax and gradient. On a GPU Unsloth keeps them below 4 GB.
BYTES_PER_LOGIT = 14
CUDA_LOGITS_BYTES = 4e9


class Lengths(NamedTuple):
    """Tokens of rows: `longest` and `trained` are the most of a training row, in all and counted by the loss;
    `different` is how many lengths there are; `answered` is how many rows are answered at once, `prompt` the longest.
    """

    longest: int
    trained: int
    different: int
    answered: int
    prompt: int


def memory_parts(model: Checkpoint, recipe: Recipe, lengths: Lengths, device: str, bf16: bool) -> dict[str, float]:
    """Bytes by part. `activations` with `logits`, and `answers`, are never there at the same time."""
    wide = recipe.dtype == "float32" or (recipe.dtype is None and not bf16 and device == "cpu")
    width = 4 if wide else 2
    activations, logits = _activations(model, recipe, lengths, width, device), _logits(model, recipe, lengths, device)
    if device == "cpu":
        there = {"libraries": LIBRARIES_BYTES + KERNEL_BYTES * min(lengths.different, KERNEL_LENGTHS)}
        activations, logits = activations * (1 + HEAP_HOLES), logits * (1 + HEAP_HOLES)
    else:
        there = {"CUDA context": CUDA_CONTEXT_BYTES}
    held = 4 if trained_in_float32(recipe) else width
    return {**there, "weights": _weights(model, recipe, held),
            "adapter and optimiser": _trained(model, recipe, held, device),
            "activations": activations, "logits": logits,
            "answers": _answers(model, recipe, lengths, width)}


def _weights(model: Checkpoint, recipe: Recipe, width: int) -> float:
    linear = sum(math.prod(shape) for shape in model.linears.values())
    rest = (model.parameters - linear) * width
    if recipe.load_in_4bit:
        return linear * NF4_BYTES + rest
    return linear * (1 if recipe.load_in_8bit else width) + rest


def trained_in_float32(recipe: Recipe) -> bool:
    """Full finetuning keeps its weights in float32 unless it is told otherwise."""
    return recipe.full_finetuning and recipe.dtype in (None, "float32")


def _trained(model: Checkpoint, recipe: Recipe, width: int, device: str) -> float:
    """Adapter, gradient and Adam's two moments; of full finetuning the last three, as the weights are counted already.

    PEFT makes adapters in float32, TRL puts those of a quantised model into bfloat16; gradients and moments follow.
    """
    small = device == "cuda" and "8bit" in recipe.optim
    if recipe.full_finetuning:
        return model.parameters * (width + (2 if small else 2 * width))
    kind = 2 if recipe.quantised else 4
    return model.adapter(recipe) * (2 * kind + (2 if small else 2 * kind))


def _activations(model: Checkpoint, recipe: Recipe, lengths: Lengths, width: int, device: str) -> float:
    """Kept for the backward pass by all layers; with checkpointing each layer's input, and one layer at work."""
    layers = model.config["num_hidden_layers"]
    tokens = recipe.per_device_train_batch_size * lengths.longest
    kept = tokens * _layer(model, recipe, lengths, width, device)
    if not recipe.use_gradient_checkpointing:
        return (layers + 1) * kept
    offloaded = device == "cuda" and recipe.use_gradient_checkpointing == "unsloth"
    inputs = 0 if offloaded else layers * tokens * width * model.config["hidden_size"]
    return inputs + 2 * kept  # its tensors and their gradients


def _layer(model: Checkpoint, recipe: Recipe, lengths: Lengths, width: int, device: str) -> float:
    """Bytes that one layer keeps of a token."""
    hidden, mlp = model.config["hidden_size"], _mlp(model)
    queries, keys = _attention(model)
    targets = model.targets(recipe).values()
    inputs = 2 * hidden + mlp if recipe.full_finetuning else \
        sum(columns + recipe.r for _, columns in targets) / model.config["num_hidden_layers"]
    if device == "cpu":
        keys = queries  # keys and values are repeated for every head
    mask = lengths.longest if recipe.per_device_train_batch_size > 1 and device == "cpu" else 0
    return 2 * 4 * hidden + width * (2 * queries + 2 * keys + mask + 3 * mlp + inputs)


def _mlp(model: Checkpoint) -> int:
    """Values between an MLP's matrices; of a mixture the experts that a token passes through."""
    config = model.config
    experts = config.get("num_experts_per_tok") or 1
    return int(experts * (config.get("moe_intermediate_size") or config.get("intermediate_size")
                          or 4 * config["hidden_size"]))


def _attention(model: Checkpoint) -> tuple[int, int]:
    """(values of the queries, values of the keys) of a token."""
    config = model.config
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return heads * size, (config.get("num_key_value_heads") or heads) * size


def _logits(model: Checkpoint, recipe: Recipe, lengths: Lengths, device: str) -> float:
    one = recipe.per_device_train_batch_size * model.config["vocab_size"] * BYTES_PER_LOGIT
    if device == "cuda":
        return min(one * lengths.longest, CUDA_LOGITS_BYTES)
    if model.config.get("model_type") in CHUNKED:
        return min(one * lengths.trained, CHUNK_LOGITS * BYTES_PER_LOGIT)
    return one * lengths.longest


def _answers(model: Checkpoint, recipe: Recipe, lengths: Lengths, width: int) -> float:
    """The cache of keys and values of a batch of answers, and the logits of their next tokens."""
    _, keys = _attention(model)
    tokens = lengths.answered * (lengths.prompt + recipe.max_new_tokens)
    cache = tokens * 2 * keys * width * model.config["num_hidden_layers"]
    return cache + lengths.answered * model.config["vocab_size"] * (4 + width)

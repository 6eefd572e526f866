"""Every field of a recipe: name, type, default, bounds, and what it does."""

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.gguf.formats import QUANTIZATIONS

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the head
ALL_LINEAR_TOO = {ALL_LINEAR, "all", "all_linear"}  # what else it is called
# The names a row's fields can have, in the shapes that kit.data.shapes reads, and behind them those of a turn.
ROW_FIELDS = ("messages", "conversations", "instruction", "input", "output", "system", "history", "tools", "prompt",
              "completion", "question", "answer", "role", "content", "from", "value")
# The words for the roles of turns: `columns` can say what they are in a file. `system` is a field as well.
ROLE_WORDS = ("system", "user", "assistant", "tool", "function_call")
Columns = dict[str, str | None]  # {our name: the file's, None for a column that is not read}
# What a field can affect: other rooms ask for it (`fields_affecting`), and keep no lists of their own.
AFFECTS = {
    "weights": "what is trained, or when it is logged; a checkpoint is resumed under the same value only",
    "precision": "the same, but a checkpoint compares the number format that comes of it",
    "rows": "the same, but a checkpoint compares the rows themselves",
    "source": "which model, adapter or data; of a path only the name is published",
    "answers": "what the same model answers",
    "place": "where things lie or go; not published",
    "run": "what is shown, made and saved, and how fast",
    "SFTConfig": "given to TRL's SFTConfig as it is",
}


def _field(default: Any, description: str, unit: str = "", *, affects: str = "weights", **bounds: Any) -> Any:
    """A field; `affects`: words of AFFECTS, separated by spaces."""
    return Field(default, description=description, json_schema_extra={"unit": unit, "affects": affects}, **bounds)


_answer = partial(_field, affects="answers")
_answers_too = partial(_field, affects="weights answers")
_precision = partial(_field, affects="precision")
_place = partial(_field, affects="place")
_rows = partial(_field, affects="rows")
_run = partial(_field, affects="run")
_sft = partial(_field, affects="weights SFTConfig")
_sft_run = partial(_field, affects="run SFTConfig")
_source = partial(_field, affects="weights source", min_length=1)


class Fields(BaseModel):
    """The fields, each checked by itself; what they must not be together stands in kit.recipe.recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True,
                              allow_inf_nan=False)

    # Run
    run_name: str = _run("run", "Name of the run's folder below output_dir: letters, digits and . _ + -, no spaces.",
                         pattern=r"^[\w+-][\w.+-]*$", max_length=80)
    overwrite: bool = _place(False, "Replace a finished run of that name, as --overwrite does.")
    output_dir: str = _place("runs", "Folder in which every run gets a folder of its own.", "path")

    # Model
    model_name: str = _source("starter", "A hub id, a folder, or `starter` for the packaged 135M model.")
    revision: str | None = _field(None, "Branch, tag or commit of a model on the hub.")
    max_seq_length: int = _field(
        2048, "Longest row in training; overlong_rows says what becomes of longer ones.", "tokens", ge=8, le=1_048_576)
    dtype: Literal["bfloat16", "float16", "float32"] | None = _field(
        None, "Number format of the weights; by default the best this machine computes in.",
        affects="precision answers")
    load_in_4bit: bool = _answers_too(False, "QLoRA: freeze the base model in 4-bit NF4, a quarter of the memory.")
    load_in_8bit: bool = _answers_too(False, "Freeze the base model in 8-bit, half of the memory.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _answers_too("nf4", "4-bit number format; nf4 suits weights better.")
    bnb_4bit_use_double_quant: bool = _answers_too(
        True, "Quantise the scales of the 4-bit weights too: 0.4 bits less each.")
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] | None = _answers_too(
        None, "Number format in which 4-bit weights are multiplied; by default that of dtype.")
    full_finetuning: bool = _field(False, "Train all weights instead of a LoRA adapter.")
    trust_remote_code: bool = _run(False, "Run Python code that comes with the model: only for authors you trust.")
    local_files_only: bool = _place(False, "Never ask the hub; use folders and the local cache only.")
    hub: Literal["huggingface", "modelscope"] = _place("huggingface", "Where hub ids are looked up.")

    # LoRA
    adapter_name_or_path: str | None = _source(
        None, "Train this adapter (a folder or hub id) further instead of a fresh one; its rank and targets are kept.")
    r: int = _field(16, "Rank of the adapter: more learns more and costs memory; 8 to 64 is usual.", "", ge=1, le=1024)
    lora_alpha: int = _field(
        16, "Strength: the adapter is scaled by lora_alpha / r; keep that in 0.5 to 2.", "", gt=0, le=4096)
    lora_dropout: float = _field(
        0.0, "Dropout inside the adapter; 0 is fastest, 0.05 to 0.1 against overfitting.", "share", ge=0, lt=1)
    target_modules: list[str] = _field(
        PROJECTIONS, "Linear layers that get an adapter: attention and MLP; `all-linear` for every one.", min_length=1)
    bias: Literal["none", "all", "lora_only"] = _field("none", "Which biases are trained; `none` is the safe one.")
    use_gradient_checkpointing: bool | Literal["unsloth"] = _field(
        "unsloth", "Recompute activations to save memory; `unsloth` also offloads them on a GPU.")
    random_state: int = _field(3407, "Seed of the adapter's first values.", ge=0, le=2**32 - 1)
    use_rslora: bool = _field(False, "Scale by lora_alpha / sqrt(r): steadier at high rank.")
    use_dora: bool = _field(
        False, "DoRA: train direction and length of each weight apart; slower, often better at low rank.")
    loftq_config: dict[str, Any] | None = _field(None, "PEFT's LoftQ settings for a start that corrects 4-bit error.")

    # Data
    dataset: str | list[str] | dict[str, float] = _field(
        "starter", "A file, a folder, a hub id or `starter`; several as a list, or with weights as {source: passes}: "
        "2 takes every row twice, 0.5 a seeded half.", affects="rows source")
    dataset_config: str | None = _rows(None, "Configuration (subset) of a data set on a hub.")
    dataset_split: str = _rows("train", "Split that is read from a hub or a folder.", min_length=1)
    dataset_revision: str | None = _rows(None, "Branch, tag or commit of a data set on a hub.")
    columns: Columns = _rows(
        {}, "Other field names: {prompt: 问题, completion: 答案} reads 问题 as prompt and 答案 as completion; and "
        "other words for roles: {user: 客户, assistant: 客服}. With null a column is not read: {system: null}.")
    eval_dataset: str | None = _field(
        None, "Held-out rows from a file of their own.", min_length=1, affects="rows source")
    test_size: float = _rows(
        0.0, "Share (below 1) or number of rows held out when eval_dataset is not set; rows with the same prompt stay "
        "on one side.", "share or rows", ge=0)
    eval_overlap: Literal["error", "drop", "keep"] = _rows(
        "error", "Held-out rows whose prompt is also trained on: refuse, leave them out of the held-out rows, or keep.")
    max_train_samples: int | None = _rows(
        None, "Train on the first rows only; the data check looks at no others.", "rows", ge=1)
    max_eval_samples: int = _rows(100, "Held-out rows, answered before and after training.", "rows", ge=0)
    answer_seconds: float | None = _run(
        300, "Time for the held-out answers of each stage (before, after, llama.cpp). If all would take longer, only "
        "the first rows are answered, at least 20; scores are compared over the same rows. null for all.",
        "seconds", gt=0)
    prompt_style: Literal["chat", "chatml", "qwen", "llama3", "alpaca"] = _answers_too(
        "chat", "Template: the model's own (chat), ChatML, Qwen's (ChatML with the system message `You are a helpful "
        "assistant.` where there is none), Llama 3's, or Alpaca's three headings.")
    chat_template: str | None = _field(
        None, "A file with a chat template of your own (Jinja), in place of prompt_style.", "path", min_length=1,
        affects="rows answers source")
    system_prompt: str | None = _answers_too(None, "System message for rows that have none of their own.")
    enable_thinking: bool | None = _answers_too(
        None, "For models that can think aloud (Qwen3): what the template is told.")
    train_on_responses_only: bool = _field(True, "Loss on the answers and their stop token only, not on prompts.")
    last_response_only: bool = _field(False, "Of a conversation of several turns, train the last answer only.")
    overlong_rows: Literal["drop", "truncate_prompt", "error"] = _field(
        "drop", "Rows longer than max_seq_length: leave out, shorten the middle of their longest prompt, or refuse. "
        "Answers are never cut.")
    lazy_preprocess: bool = _field(
        False, "Keep rows on disk and tokenise them when they are used: for data larger than memory.")
    metric: Literal["json", "exact", "none"] = _run(
        "none", "How held-out answers are scored: JSON fields, exact text, or not at all.")

    # Training (TRL's SFTConfig)
    per_device_train_batch_size: int = _sft(2, "Rows per forward pass on each device.", "rows", ge=1, le=4096)
    gradient_accumulation_steps: int = _sft(
        4, "Forward passes added up before each optimiser step.", "passes", ge=1, le=65536)
    max_steps: int | None = _field(None, "Optimiser steps in all; set this or num_train_epochs.", "steps", ge=-1)
    num_train_epochs: float | None = _field(
        None, "Passes over the data; 1 when neither is set.", "epochs", gt=0, le=10_000)
    learning_rate: float = _sft(2e-4, "Peak learning rate; 1e-4 to 3e-4 is usual for LoRA.", "per step", gt=0, le=1)
    warmup_steps: float = _sft(
        5, "Steps (1 and more) or share of the run (below 1) in which the rate rises.", "steps or share", ge=0)
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt", "reduce_lr_on_plateau", "warmup_stable_decay"] = _sft(
        "linear", "How the learning rate falls after the warm-up.")
    optim: str = _field("adamw_8bit", "Optimiser by transformers' name; 8-bit ones need a GPU.", min_length=1)
    weight_decay: float = _sft(
        0.01, "Pull of the trained weights towards zero; 0 to 0.01 is usual for LoRA.", "per step", ge=0, le=1)
    adam_beta1: float = _sft(0.9, "Memory of Adam's mean.", "", ge=0, lt=1)
    adam_beta2: float = _sft(0.999, "Memory of Adam's variance; 0.95 reacts faster.", "", ge=0, lt=1)
    max_grad_norm: float = _sft(1.0, "Gradients longer than this are shortened to it.", "", ge=0)
    neftune_noise_alpha: float | None = _sft(None, "Noise on the embeddings against overfitting; 5 is usual.", ge=0)
    bf16: bool | None = _precision(None, "Mixed precision in bfloat16; by default chosen for this machine.")
    fp16: bool | None = _precision(None, "Mixed precision in float16; by default chosen for this machine.")
    packing: bool = _field(False, "Join short rows to full length (GPU): faster on short rows.")
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = _sft(
        "random", "Order of rows; group_by_length wastes less padding.")
    dataloader_pin_memory: bool = _sft_run(True, "Faster copies to a GPU; false saves memory of the host.")
    dataloader_num_workers: int = _sft_run(0, "Extra processes that load rows.", "processes", ge=0, le=64)
    logging_steps: int = _sft(1, "Steps between two log lines.", "steps", ge=1)
    eval_strategy: Literal["no", "steps", "epoch"] = _sft(
        "no", "When the held-out rows are evaluated during training: loss, perplexity, token accuracy.")
    eval_steps: int = _sft(100, "Steps between two evaluations.", "steps", ge=1)
    per_device_eval_batch_size: int | None = _field(
        None, "Rows per evaluation pass; by default as in training.", "rows", ge=1, le=4096)
    early_stopping_patience: int | None = _field(
        None, "Stop after so many evaluations without a lower loss.", "evaluations", ge=1)
    early_stopping_threshold: float = _field(0.0, "How much lower counts as lower.", "nats", ge=0)
    load_best_model_at_end: bool = _field(False, "Keep the checkpoint of the lowest held-out loss, and end with it.")
    save_strategy: Literal["no", "steps", "epoch"] = _run("no", "Checkpoints by steps or epochs, besides save_minutes.")
    save_steps: int = _run(500, "Steps between two checkpoints.", "steps", ge=1)
    save_minutes: float | None = _run(10, "Wall time between two checkpoints; null for none.", "minutes", gt=0)
    save_total_limit: int | None = _run(2, "Checkpoints kept, the newest.", "checkpoints", ge=1)
    checkpoint_dir: str | None = _place(
        None, "Where checkpoints go instead of the run folder, for example a mounted drive that outlives the machine; "
        "each run has a folder in it.", "path")
    resume_from_checkpoint: bool = _run(True, "Resume from the newest sound checkpoint of a run that was stopped.")
    fsdp: bool = _run(False, "Several processes: shard the model over them with Unsloth's FSDP2.")
    deepspeed: str | None = _place(
        None, "Several processes: a DeepSpeed configuration, for example recipes/deepspeed/zero2.json.", "path")
    ddp_timeout: int = _sft_run(
        7200, "How long processes wait for the slowest before they give up.", "seconds", ge=60)
    report_to: str | list[str] = _field(
        "none", "Where curves are sent besides the run folder: none, or one or several trackers by transformers' names "
        "(wandb, swanlab, tensorboard, mlflow, …).", affects="place SFTConfig")
    seed: int = _field(3407, "Seed of row order and dropout.", ge=0, le=2**32 - 1, affects="weights answers SFTConfig")

    # Inference
    max_input_length: int | None = _answer(
        None, "Longest prompt of kit answer; of a longer one the middle is cut. By default max_seq_length.", "tokens",
        ge=8)
    max_new_tokens: int = _answer(128, "Longest answer.", "tokens", ge=1, le=131_072)
    temperature: float = _answer(0.0, "0 answers with the likeliest token; higher is more varied.", "", ge=0, le=5)
    top_p: float = _answer(1.0, "Sample from the likeliest tokens that make up this share.", "share", gt=0, le=1)
    top_k: int = _answer(0, "Sample from this many likeliest tokens; 0 for all.", "tokens", ge=0)
    min_p: float = _answer(0.0, "Leave out tokens below this share of the likeliest one.", "share", ge=0, le=1)
    repetition_penalty: float = _answer(1.0, "Above 1 makes repeated tokens less likely.", "", gt=0, le=5)

    # Export
    save_merged: Literal["none", "16bit", "4bit"] = _run(
        "16bit", "Merge the adapter into a 16-bit model; 4bit also writes it in bitsandbytes' NF4 to merged-4bit/.")
    gguf: list[str] = _run([], f"GGUF files to write: {', '.join(QUANTIZATIONS)}; [] for none.")
    push_to_hub: list[Literal["adapter", "merged", "merged-4bit", "gguf"]] = _place(
        [], "What of a verified run is pushed to the hub; [] for nothing.")
    hub_model_id: str | None = _place(
        None, "Repository to push to, user/name; by default run_name in the login's own account.",
        pattern=r"^[\w.-]+(/[\w.-]+)?$")
    hub_private_repo: bool = _place(True, "Whether a repository that is made is private.")
    num_ctx: int | None = _run(None, "Context in the Modelfile; by default max_seq_length.", "tokens", ge=8)


def fields_affecting(word: str) -> tuple[str, ...]:
    """The fields that have this word of AFFECTS, in the recipe's order."""
    schema = Fields.model_json_schema()["properties"]
    return tuple(name for name, field in schema.items() if word in field["affects"].split())

#!/usr/bin/env python
# coding: utf-8
# In[ ]:
get_ipython().run_cell_magic('capture', '', '!pip install unsloth')
# In[ ]:
from unsloth import FastLanguageModel
import torch

max_seq_length = 1024
dtype = None
load_in_4bit = False
ROOT = "/root/autodl-tmp"
fourbit_models = ["unsloth/Qwen3-4B-unsloth-bnb-4bit"]

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = f"{ROOT}/models/Qwen/Qwen3-4B",
    max_seq_length = max_seq_length,
    dtype = dtype,
    load_in_4bit = load_in_4bit,
    local_files_only = True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r = 2 * 16,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj",
                      "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = False,
    loftq_config = None,
)
alpaca_prompt = """Below is an instruction that describes a task.

### Instruction:
{}

### Input:
{}

### Response:
{}"""
from datasets import load_dataset
dataset = load_dataset(ROOT + "/datasets/yahma/alpaca-cleaned", split = "train")
from trl import SFTTrainer
from transformers import TrainingArguments
from unsloth import is_bfloat16_supported
trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    packing = False,
    args = TrainingArguments(
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 4,
        warmup_steps = 5,
        max_steps = 60,
        learning_rate = 2e-4,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        output_dir = "outputs",
        report_to = "none",
    ),
)
trainer.train()
if False:
    model, tokenizer = FastLanguageModel.from_pretrained(model_name = "lora_model", load_in_4bit = True)
if False: model.save_pretrained_merged("model", tokenizer, save_method = "merged_4bit",)
model.save_pretrained_gguf("model", tokenizer, quantization_method = ["q4_k_m", "q8_0"])

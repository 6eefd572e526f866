import argparse
from unsloth import FastLanguageModel
from trl import SFTConfig, SFTTrainer
from unsloth.chat_templates import get_chat_template, train_on_responses_only
from datasets import load_dataset
def main(args):
    model, tokenizer = FastLanguageModel.from_pretrained(args.model, max_seq_length=4096)
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64)
    tokenizer = get_chat_template(tokenizer, chat_template="qwen-2.5")
    ds = load_dataset("json", data_files={"train": "rows.jsonl"}, split="train[:1000]")
    kw = dict(a=1)
    trainer = SFTTrainer(model=model, train_dataset=ds, args=SFTConfig(num_train_epochs=2, learning_rate=1e-4, warmup_ratio=0.03, output_dir="o"))
    trainer = train_on_responses_only(trainer, instruction_part="x", response_part="y")
    trainer.train()
main(argparse.ArgumentParser().parse_args())

#!/bin/bash
export CUDA_VISIBLE_DEVICES=0,1
BITS=8   # 4 or 8; don't set it for 16-bit
DATA="data/ruozhiba 弱智吧.jsonl"
torchrun --nproc_per_node=2 --master_port 29501 sft_qwen_quantization.py \
    --dataset_name_or_path "$DATA" \
    --pretrained_model_name_or_path /models/Qwen2.5-0.5B \
    --output_dir output/ruozhiba_qlora${BITS} \
    --quantization_bit $BITS \
    --padding_side left \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --learning_rate 2e-4 \
    --num_train_epochs 3 \
    --logging_steps 1 \
    --save_strategy epoch \
    --save_total_limit 2

NPROC_PER_NODE=4 \
swift sft \
    --model_id_or_path qwen/Qwen2-7B \
    --train_type full \
    --dataset rows.jsonl#500 \
    --val_dataset held.jsonl \
    --max_length 4096 \
    --truncation_strategy left \
    --loss_scale all \
    --use_hf true \
    --deepspeed zero3

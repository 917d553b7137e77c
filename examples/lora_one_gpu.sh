#!/usr/bin/env bash
# Adapters for an 8 B model on one GPU of 80 GB: planned, trained, written for peft, and merged into a whole model.
set -euo pipefail
RECIPE=${RECIPE-lmpo_llama3_8b}
MODEL=${MODEL-meta-llama/Meta-Llama-3-8B-Instruct}
WORK=${WORK-lora_one_gpu}

settings=(
    trainer.devices=1 model.tensor_model_parallel_size=1 model.sequence_parallel=false
    model.peft.name=lora model.peft.rank=16 optim.lr=1e-5
    model.restore_from_path="$MODEL" run_dir="$WORK/run" "$@"
)
nemo-lmpo check "$RECIPE" "${settings[@]}"                                 # memory, against the card's
nemo-lmpo train "$RECIPE" "${settings[@]}"                                 # checkpoints hold the adapters alone
nemo-lmpo convert nemo-to-hf --input "$WORK/run" --output "$WORK/adapter" --adapter # for peft and vLLM
nemo-lmpo export "$WORK/run" --output "$WORK/merged"                       # a whole model with its card

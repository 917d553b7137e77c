#!/usr/bin/env bash
# A model learns a format from its own answers: a function counts whether they keep it, and pairs are made of them.
set -euo pipefail
RECIPE=${RECIPE-lmpo_smollm2_135m}
MODEL=${MODEL-HuggingFaceTB/SmolLM2-135M-Instruct}
SAMPLES=${SAMPLES-4}
SAMPLING=${SAMPLING---max-new-tokens 64 --batch-size 96}
WORK=${WORK-follow_a_format}
HERE=$(cd "$(dirname "$0")" && pwd)
REWARD=${REWARD-$HERE/bullet_points.py:bullet_points} # or MODULE:FUNCTION

python "$HERE/bullet_points.py" prompts "$WORK"
# shellcheck disable=SC2086 # SAMPLING holds several options
nemo-lmpo pairs --model "$MODEL" --prompts "$WORK/train.jsonl" --samples "$SAMPLES" $SAMPLING \
    --reward "$REWARD" --output "$WORK/pairs"
nemo-lmpo train "$RECIPE" model.restore_from_path="$MODEL" data.train.path="$WORK/pairs" run_dir="$WORK/run" \
    optim.lr=2e-5 trainer.max_steps=16 "$@"
for model in "$MODEL" "$WORK/run"; do
    answers="$WORK/answers_$(basename "$model").jsonl"
    nemo-lmpo generate --model "$model" --prompts "$WORK/held_out.jsonl" --output "$answers" \
        --max-new-tokens 64 --batch-size 48 --temperature 0.8 --top-p 0.95
    python "$HERE/bullet_points.py" score "$answers"
done

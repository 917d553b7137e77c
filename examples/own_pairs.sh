#!/usr/bin/env bash
# From pairs of your own to an exported model that answers. PAIRS is any source of docs/data.md.
set -euo pipefail
RECIPE=${RECIPE-lmpo_smollm2_135m}
MODEL=${MODEL-HuggingFaceTB/SmolLM2-135M-Instruct} # empty: where the recipe starts
PAIRS=${PAIRS-$(dirname "$0")/pairs.jsonl}
PROMPTS=${PROMPTS-$(dirname "$0")/prompts.jsonl}
WORK=${WORK-own_pairs}

settings=(data.train.path="$PAIRS" run_dir="$WORK/run" ${MODEL:+model.restore_from_path="$MODEL"} "$@")
nemo-lmpo check "$RECIPE" "${settings[@]}"     # valid? what of the rows is used, how much memory
nemo-lmpo train "$RECIPE" "${settings[@]}"     # the same command resumes
nemo-lmpo report "$WORK/run"                   # the curves
nemo-lmpo export "$WORK/run" --output "$WORK/model"
nemo-lmpo generate --model "$WORK/model" --prompts "$PROMPTS" --output "$WORK/answers.jsonl"

#!/usr/bin/env bash
# From a base model to pairs of its own: fine-tuned on answers, sampled, scored by a function, paired, trained on.
set -euo pipefail
SETTING=${SETTING-tiny}
PROMPTS=${PROMPTS-builtin:tiny}
REWARD=${REWARD-rewards:letters_in_order} # MODULE:FUNCTION, here in rewards.py
SAMPLES=${SAMPLES-5}
WORK=${WORK-pairs_of_its_own}
PYTHONPATH=$(cd "$(dirname "$0")" && pwd)${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH

nemo-lmpo train "sft_$SETTING" run_dir="$WORK/sft" "$@"
# shellcheck disable=SC2086 # SAMPLING may hold several options, such as --limit 100
nemo-lmpo pairs --model "$WORK/sft" --prompts "$PROMPTS" --samples "$SAMPLES" --reward "$REWARD" \
    --length-control --output "$WORK/pairs" ${SAMPLING-}
nemo-lmpo train "lmpo_$SETTING" run_dir="$WORK/lmpo" model.restore_from_path="$WORK/sft" \
    data.train.path="$WORK/pairs" "$@"
nemo-lmpo report "$WORK/lmpo"

#!/usr/bin/env bash
# LMPO against SimPO on the same pairs in the same order: a run for each seed, and one page about all of them.
set -euo pipefail
SETTING=${SETTING-tiny}
LOSSES=${LOSSES-simpo lmpo} # the others are compared with the first
SEEDS=${SEEDS-1 2 3}
WORK=${WORK-compare_losses}

runs=()
for loss in $LOSSES; do
    for seed in $SEEDS; do
        run=$WORK/${loss}_seed$seed
        nemo-lmpo train "${loss}_$SETTING" model.seed="$seed" run_dir="$run" "$@"
        runs+=("$run")
    done
done
nemo-lmpo compare "${runs[@]}" --output "$WORK/comparison" # comparison.html: curves, differences, verdicts

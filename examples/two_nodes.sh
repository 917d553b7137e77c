#!/usr/bin/env bash
# Two nodes of a Slurm cluster: from the login node, in the folder of the checkout. Fill in slurm/cluster.env first.
set -euo pipefail
RECIPE=${RECIPE-lmpo_llama3_8b}
GPUS=${GPUS-4} # of a node
WORK=${WORK-two_nodes}

settings=(trainer.num_nodes=2 trainer.devices="$GPUS" run_dir="$WORK/run" "$@")
nemo-lmpo check "$RECIPE" "${settings[@]}"
# shellcheck disable=SC2086 # SUBMIT may hold several options, such as --print
nemo-lmpo slurm submit "$RECIPE" --nodes 2 --gpus-per-node "$GPUS" ${SUBMIT-} "${settings[@]}"
nemo-lmpo slurm status "$WORK/run" || true # nothing there until the job has run

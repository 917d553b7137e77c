#!/bin/bash
# What srun starts: `task.sh rank COMMAND...` one process of a run, `task.sh node COMMAND...` torchrun on a node,
# which starts as many ranks as NEMO_LMPO_RANKS_PER_NODE. Runs inside the container, if there is one.
set -u
if [ -z "${SLURM_JOB_ID:-}" ] || [ $# -lt 2 ]; then
    echo "slurm: error: the templates start this inside of a Slurm job; submit one of them with sbatch" >&2
    exit 1
fi

# A request to save must not kill a process that is still importing; the trainer listens as soon as it can, and
# torchrun never does.
trap '' USR1

kind=$1
shift
if [ "$kind" = node ]; then
    exec "$NEMO_LMPO_PYTHON" -m torch.distributed.run --nnodes="$NEMO_LMPO_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$NEMO_LMPO_RANKS_PER_NODE" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        --max-restarts=0 --no-python bash "$0" rank "$@"
fi

log=$NEMO_LMPO_JOB_DIR/rank-${RANK:-${SLURM_PROCID:-0}}.log
# Straight into the file, without a pipe: the last lines of a killed process are not lost, and signals reach the process
# itself.
exec >>"$log" 2>&1
echo "=== rank ${RANK:-${SLURM_PROCID:-0}} on $(hostname), restart ${SLURM_RESTART_COUNT:-0}"
exec "$@"

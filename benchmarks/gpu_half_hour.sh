#!/usr/bin/env bash
# What half an hour on one GPU can prove: each command ends within ten minutes, and all that they print goes into
# RESULTS (default: benchmarks/results/gpu.md), as a page to keep.
#
#   benchmarks/gpu_half_hour.sh [all | doctor | runs | tests | attention | rank | checkpoints | engine]
#
# Needs the package's dependencies and a CUDA build of torch; no network, no data and no model from outside.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
RESULTS="${RESULTS:-benchmarks/results/gpu.md}"
WORK="${WORK:-$(mktemp -d)}"
PYTHON="${PYTHON:-python3}"
failed=()

# title, then the command
measure() {
    local title="$1" started=$SECONDS status
    shift
    printf '\n## %s\n\n```\n$ %s\n' "$title" "$*" | tee -a "$RESULTS"
    timeout --kill-after=10 600 "$@" 2>&1 | grep -v -i warning | tee -a "$RESULTS"
    status=${PIPESTATUS[0]}
    printf '```\n\nstatus %d after %d s\n' "$status" "$((SECONDS - started))" | tee -a "$RESULTS"
    [ "$status" = 0 ] || failed+=("$title")
}

train() { measure "$1" "$PYTHON" -m nemo_lmpo.train --config-name lmpo_tiny "${@:2}"; }

doctor() { measure "Doctor" "$PYTHON" -m nemo_lmpo.doctor --directory "$WORK"; }

runs() {
    local tiny=(run_dir="$WORK/tiny" trainer.precision=bf16 checkpoint.save_interval=10 checkpoint.async_save=true)
    train "Training, asynchronous checkpoints" "${tiny[@]}" trainer.max_steps=30
    train "Resumed" "${tiny[@]}" trainer.max_steps=40
    CUDA_VISIBLE_DEVICES='' train "Resumed on the CPU" "${tiny[@]}" trainer.max_steps=42
}

tests() { measure "Tests" "$PYTHON" -m pytest tests/gpu -q -k "not te" -p no:cacheprovider; }

attention() {
    measure "Attention, 8 heads" "$PYTHON" benchmarks/attention_kernels.py --heads 8 2
    measure "Attention, 32 heads" "$PYTHON" benchmarks/attention_kernels.py --heads 32 8
}

rank() {
    local engine=model.transformer_engine=false
    measure "A rank of TP 4, row 4096" "$PYTHON" benchmarks/one_rank.py "$engine"
    measure "A rank of TP 4, row 8192" "$PYTHON" benchmarks/one_rank.py --row-tokens 8192 "$engine"
    measure "A rank of TP 4, logits of 4096 positions" "$PYTHON" benchmarks/one_rank.py \
        "$engine" model.logprob_chunk_tokens=4096
}

checkpoints() {
    # 2.0 B parameters: 28 GB a checkpoint, so that only one is kept.
    local large=(model.architecture.hidden_size=4096 model.architecture.intermediate_size=3584
        model.architecture.num_hidden_layers=30 model.architecture.num_attention_heads=32
        model.architecture.num_key_value_heads=8 trainer.precision=bf16 trainer.val_check_interval=0
        checkpoint.keep_last=1 checkpoint.keep_best=0 logging.tensorboard=false logging.report=false)
    train "Saved, 2 B parameters" "${large[@]}" run_dir="$WORK/large" trainer.max_steps=3
    train "Resumed, 2 B parameters" "${large[@]}" run_dir="$WORK/large" trainer.max_steps=5
    rm -rf "${WORK:?}/large"
    train "Saved asynchronously, 2 B parameters" "${large[@]}" run_dir="$WORK/large" trainer.max_steps=6 \
        checkpoint.async_save=true checkpoint.save_interval=3
    rm -rf "${WORK:?}/large"
}

engine() {
    if ! "$PYTHON" -c 'import transformer_engine.pytorch' 2>/dev/null; then
        printf '\n## Transformer Engine\n\nnot installed\n' | tee -a "$RESULTS"
        return
    fi
    measure "Tests with Transformer Engine" "$PYTHON" -m pytest tests/gpu -q -k te -p no:cacheprovider
    measure "A rank of TP 4, Transformer Engine" "$PYTHON" benchmarks/one_rank.py model.transformer_engine=true
}

parts="${*:-all}"
[ "$parts" = all ] && parts="doctor runs tests attention rank checkpoints engine"
mkdir -p "$(dirname "$RESULTS")"
printf '# One GPU, %s\n' "$(date -u +%F)" | tee -a "$RESULTS"
for part in $parts; do
    case "$part" in
        doctor | runs | tests | attention | rank | checkpoints | engine) "$part" ;;
        *) echo "error: $part is unknown; see the head of this file" >&2; exit 2 ;;
    esac
done
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "$(printf '%s; ' "${failed[@]}")" | tee -a "$RESULTS"
    exit 1
fi

#!/usr/bin/env bash
# What half an hour on one GPU can prove, as a page for benchmarks/results/: kernels, parity, tests, speed and memory
# against the plan, checkpoints. It works in pieces, each below ten minutes, and goes on where it was stopped or killed:
# run the same line until its status is not 75. Needs the package's dependencies and a CUDA build of torch; no network,
# no data and no model from outside, 64 GiB of disk.
#
#   bash benchmarks/gpu_half_hour.sh [--seconds 570] [--fresh] [PART ...]
#   bash benchmarks/gpu_half_hour.sh --rehearse     the same without a GPU: small shapes, the CPU in the GPU's place
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.half_hour "$@"

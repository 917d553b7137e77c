"""Steps of one rank with random weights, without the other ranks: time, MFU and memory against the dry run.

    python benchmarks/one_rank.py [--tensor-parallel 4] [--layers 32] [--row-tokens 4096] [KEY=VALUE ...]

The model is the part of Llama-3-8B that a rank of ``--tensor-parallel`` holds, as a whole model of its own: nothing is
communicated, so that what is measured is kernels, host and memory. Pairs have UltraFeedback's mean lengths, spread
log-normally.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

from nemo_lmpo.runtime.environment import prepare_environment

prepare_environment()  # as a run does, before torch is loaded

import numpy as np
import torch

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import ParallelLayout, validate
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.example import Example
from nemo_lmpo.monitor.throughput import peak_memory_gib
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.sizing.cards import CARDS, Machine, peak_flops
from nemo_lmpo.sizing.flops import model_flops, shape_of
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import split_of
from nemo_lmpo.sizing.step_time import step_time
from nemo_lmpo.sizing.typical_rows import PAIR, step_rows
from nemo_lmpo.training.batches import BatchBuilder, StepBatch
from nemo_lmpo.training.optimizer import build_optimizer, clip_and_step, gradient_norm
from nemo_lmpo.training.policy import Policy, kernels_for
from nemo_lmpo.training.process import distributed_session
from nemo_lmpo.training.start_model import find_start_model

SPREAD = 0.5
"""Standard deviation of the lengths' logarithms."""


class SpreadPairs:
    """Pairs of random ids whose lengths have the typical means."""

    def __init__(self, count: int, config: Config, vocabulary: int) -> None:
        random = np.random.default_rng(0)
        typical = np.array((PAIR.prompt, *PAIR.responses))
        lengths = typical * np.exp(random.normal(0, SPREAD, (count, 3)) - SPREAD**2 / 2)
        limit = config.data.max_length - config.data.max_prompt_length
        self.lengths = np.clip(lengths.astype(np.int64), 2, [config.data.max_prompt_length, limit, limit])
        self.vocabulary = vocabulary

    num_responses = 2
    mismatched = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        random = np.random.default_rng(index)
        prompt, chosen, rejected = (random.integers(0, self.vocabulary, size).tolist() for size in self.lengths[index])
        return Example.pair(str(index), prompt, chosen, rejected)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tensor-parallel", type=int, default=4, help="whose rank (default: 4)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after two of warm-up")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings")
    return parser.parse_args()


def layout_of(options: argparse.Namespace) -> ParallelLayout:
    """The rank's model as one process's."""
    parts, hidden = options.tensor_parallel, options.hidden
    heads = max(8, hidden // 128)
    config = load_recipe(
        "lmpo_llama3_8b",
        [
            "model.restore_from_path=null",
            "model.tokenizer=builtin:tiny",
            f"model.architecture.hidden_size={hidden}",
            f"model.architecture.intermediate_size={hidden * 7 // 2 // parts}",
            f"model.architecture.num_hidden_layers={options.layers}",
            f"model.architecture.num_attention_heads={heads // parts}",
            f"model.architecture.num_key_value_heads={max(1, heads // 4 // parts)}",
            f"model.architecture.head_dim={hidden // heads}",
            f"model.architecture.vocab_size={128256 // parts}",
            "model.tensor_model_parallel_size=1",
            "model.sequence_parallel=false",
            "optim.use_distributed_optimizer=false",
            "optim.overlap_grad_reduce=false",
            f"model.global_batch_size={options.pairs}",
            f"data.row_tokens={options.row_tokens}",
            f"data.max_length={options.row_tokens // 2}",
            f"data.max_prompt_length={options.row_tokens // 4}",
            *options.overrides,
        ],
    )
    return validate(config, find_start_model(config.model).architecture, 1)


def measure(layout: ParallelLayout, steps: int) -> dict[str, Any]:
    """Seconds of each step, and what it computed."""
    config = layout.config
    with distributed_session(config, LaunchInfo()) as (groups, device):
        kernels = kernels_for(config, layout.architecture, use_cuda=device.type == "cuda")
        policy = Policy(config, layout.architecture, groups, device, kernels)
        for chunk in policy.models:
            for parameter in chunk.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        optimizer = build_optimizer(policy.chunks, config)
        pairs = SpreadPairs(config.model.global_batch_size, config, layout.architecture.vocab_size)
        builder = BatchBuilder(config, groups, device=device, pad_id=0)
        batch = builder.build(pairs, np.arange(len(pairs)))
        seconds = [step(policy, optimizer, batch, config) for _ in range(steps + 2)][2:]
        reserved = torch.cuda.max_memory_reserved() / GIB if device.type == "cuda" else float("nan")
        return {
            "seconds": seconds,
            "batch": batch,
            "kernels": policy.kernels,
            "allocated": peak_memory_gib(),
            "reserved": reserved,
        }


def step(policy: Policy, optimizer: Any, batch: StepBatch, config: Config) -> float:
    """An optimizer step as the trainer does it; its wall time, to the last kernel."""
    started = time.perf_counter()
    policy.prepare_for_training_step()
    optimizer.zero_grad()
    policy.get_loss_and_metrics(batch, forward_only=False)
    policy.finish_training_step()
    clip_and_step(optimizer, gradient_norm(optimizer), config.trainer.gradient_clip_val)
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print one row of a table."""
    options = parse_arguments()
    layout = layout_of(options)
    found = measure(layout, options.steps)
    batch: StepBatch = found["batch"]
    seconds = statistics.median(found["seconds"])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    flops = model_flops(
        layout.architecture, tokens=batch.tokens, predicted_tokens=batch.predicted, attended=batch.attended
    )
    peak = peak_flops(name)
    mfu = f"{100 * flops / seconds / peak:.1f} %" if peak else "-"
    card = next((card for key, card in CARDS.items() if key in name.lower()), CARDS["a100"])
    rows, row = step_rows(layout.config, 1)
    planned = step_time(shape_of(layout.architecture), split_of(layout), row, rows, Machine(card, 1)).total
    print(
        "| device | row | rows | layers, attention | step s (all) | planned s | pairs/s | MFU "
        "| allocated GiB | dry run | reserved |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    kernels = f"{'TE' if found['kernels'].transformer_engine else 'local'}, {found['kernels'].attention}"
    every = " ".join(f"{one:.2f}" for one in found["seconds"])
    print(
        f"| {name} | {options.row_tokens} | {len(batch.micro_batches)} | {kernels} | {seconds:.2f} ({every}) "
        f"| {planned:.2f} | {options.pairs / seconds:.1f} | {mfu} | {found['allocated']:.1f} "
        f"| {estimate_memory(layout).total / GIB:.1f} | {found['reserved']:.1f} |"
    )


if __name__ == "__main__":
    main()

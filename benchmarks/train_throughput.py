"""Packed training of this project against a plain padded `transformers` loop, on the same pairs in one run.

    python benchmarks/train_throughput.py --model SMOLLM2_DIR --data PAIRS.jsonl.gz [--rounds 3] [--output FILE]

Each measurement is a process of its own (so that peak memory is its own); the two alternate, and medians and
ratios are printed. Both train in float32 with AdamW on the LMPO loss, on pairs of at most `--max-length` tokens:
those of the data that are as short, or with `--truncate` all, cut to that length (few of which then need padding).
The loop does what preference trainers do: chosen and rejected padded to one batch, `--micro-batch` pairs at a
time, logits of every position.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("packed", "packed_prompt_twice", "lora", "transformers")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="Hugging Face directory of a Llama or Mistral model")
    parser.add_argument("--data", required=True, help="preference pairs, as data.train.path")
    parser.add_argument("--recipe", default="lmpo_smollm2_135m")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument(
        "--truncate", action="store_true", help="take all pairs and cut long ones, instead of only pairs that fit"
    )
    parser.add_argument("--pairs", type=int, default=8, help="pairs of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=2, help="pairs that the transformers loop pads together")
    parser.add_argument("--steps", type=int, default=1, help="measured steps, after one step of warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--override", action="append", default=[], help="a further setting of the recipe")
    parser.add_argument("--variants", nargs="+", default=["packed", "transformers"], choices=VARIANTS)
    parser.add_argument("--output", type=Path, help="write the result as Markdown, too")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def longest(options: argparse.Namespace) -> tuple[int, int]:
    """Most tokens of a sequence, and of its prompt."""
    return options.max_length, options.max_length * 2 // 3


def overrides(options: argparse.Namespace) -> list[str]:
    """The recipe's settings for this measurement."""
    sequence, prompt = longest(options)
    return [
        f"model.restore_from_path={options.model}",
        f"data.train.path={options.data}",
        "data.validation.path=null",
        f"data.max_length={sequence}",
        f"data.max_prompt_length={prompt}",
        f"model.global_batch_size={options.pairs}",
        "trainer.precision='32'",
        "trainer.max_steps=1000",
        f"data.share_prompt={'false' if options.child == 'packed_prompt_twice' else 'true'}",
        *(["model.peft.name=lora", "model.peft.rank=16"] if options.child == "lora" else []),
        *options.override,
    ]


def measure(train_step: Callable[[int], int], options: argparse.Namespace) -> dict[str, float]:
    """Warm up, then time steps; ``train_step`` returns the tokens of real (not padding) text."""
    from nemo_lmpo.monitor.throughput import peak_memory_gib

    train_step(0)
    started = time.perf_counter()
    tokens = sum(train_step(step) for step in range(1, options.steps + 1))
    seconds = time.perf_counter() - started
    return {
        "pairs_per_second": options.pairs * options.steps / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_gib": peak_memory_gib(),
    }


def run_packed(options: argparse.Namespace) -> dict[str, float]:
    """This project's training session."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.runtime.launch import LaunchInfo
    from nemo_lmpo.training.session import open_session

    with tempfile.TemporaryDirectory() as folder:
        config = load_recipe(options.recipe, [*overrides(options), f"run_dir={folder}"])
        with open_session(config, LaunchInfo()) as session:
            trainer = session.trainer()

            def train_step(step: int) -> int:
                trainer.train_step(step)
                lengths = session.data.train.lengths[session.steps.sampler.pairs_of_step(step)]
                return int((2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).sum())

            return measure(train_step, options)


def run_transformers(options: argparse.Namespace) -> dict[str, float]:
    """The padded loop on the same pairs in the same order."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.data.order import PairSampler
    from nemo_lmpo.data.preference import load_preference_dataset
    from nemo_lmpo.data.tokenizer import load_tokenizer
    from nemo_lmpo.loss.interface import LossInputs
    from nemo_lmpo.loss.registry import build_loss

    config = load_recipe(options.recipe, overrides(options))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pairs = load_preference_dataset(config.data, config.data.train, load_tokenizer(options.model))
    sampler = PairSampler(len(pairs), options.pairs, config.model.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.0)
    loss = build_loss(config.loss)

    def batch_logprobs(sequences: list[tuple[list[int], list[int]]]) -> Any:
        """Sums of response log-probabilities, ``[2 * pairs]``."""
        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        attention = torch.zeros_like(ids)
        responses = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, response) in enumerate(sequences):
            length = len(prompt) + len(response)
            ids[row, :length] = torch.tensor(prompt + response)
            attention[row, :length] = 1
            responses[row, len(prompt) : length] = True
        logits = model(ids, attention_mask=attention, use_cache=False).logits[:, :-1].float()
        logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logprobs * responses[:, 1:]).sum(1)

    def train_step(step: int) -> int:
        chosen = [pairs[int(index)] for index in sampler.pairs_of_step(step)]
        tokens = 0
        for first in range(0, len(chosen), options.micro_batch):
            part = chosen[first : first + options.micro_batch]
            sequences = [
                (pair.prompt_ids, ids) for pair in part for ids in (response.ids for response in pair.responses)
            ]
            sums = batch_logprobs(sequences)
            counts = torch.tensor([float(len(response)) for _, response in sequences])
            outputs = loss(LossInputs(sums[0::2], sums[1::2], counts[0::2], counts[1::2]))
            (outputs.losses.sum() / options.pairs).backward()
            tokens += sum(len(prompt) + len(response) for prompt, response in sequences)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return tokens

    return measure(train_step, options)


def write_fitting_pairs(options: argparse.Namespace, path: Path) -> None:
    """Copy the pairs of which both sequences have at most `--max-length` tokens."""
    import numpy as np

    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.data.preference import load_preference_dataset
    from nemo_lmpo.data.read import open_source
    from nemo_lmpo.data.tokenizer import load_tokenizer

    config = load_recipe(options.recipe, overrides(argparse.Namespace(**{**vars(options), "max_length": 10**6})))
    lengths = load_preference_dataset(config.data, config.data.train, load_tokenizer(options.model)).lengths[:]
    rows = [row.value for row in open_source(options.data, config.data.train.split_of(0)).read()]
    if len(rows) != len(lengths):
        raise SystemExit(f"error: only {len(lengths)} of {len(rows)} rows of {options.data} are usable; use --truncate")
    sequence, prompt = longest(options)
    fits = (lengths[:, 0] + lengths[:, 1:].max(1) <= sequence) & (lengths[:, 0] <= prompt)
    path.write_text("".join(json.dumps(rows[index]) + "\n" for index in np.flatnonzero(fits)))
    print(f"{fits.sum()} of {len(rows)} pairs fit {sequence} tokens", file=sys.stderr)


def run_child(options: argparse.Namespace, variant: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--data", options.data, "--child", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the measurement of {variant} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Medians, and ratios to the transformers loop round by round."""
    import torch

    names = ("pairs_per_second", "tokens_per_second", "peak_gib")
    lines = [
        f"{Path(options.model).name}, {options.pairs} pairs of at most {options.max_length} tokens "
        f"({'longer ones cut' if options.truncate else 'none cut'}) a step, float32, "
        f"AdamW, {options.rounds} rounds of {options.steps} step(s) after warm-up; "
        f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), torch {torch.__version__}.",
        "",
        "| | pairs/s | tokens/s | peak GiB |",
        "|---|---|---|---|",
    ]
    for variant, rounds in results.items():
        medians = [statistics.median(result[name] for result in rounds) for name in names]
        lines.append(f"| {variant} | {medians[0]:.3f} | {medians[1]:.0f} | {medians[2]:.2f} |")
    for variant, rounds in results.items():
        if variant == "transformers" or "transformers" not in results:
            continue
        ratios = [
            statistics.median(
                ours[name] / theirs[name] for ours, theirs in zip(rounds, results["transformers"], strict=True)
            )
            for name in names
        ]
        lines.append(f"| {variant} / transformers | {ratios[0]:.2f} x | {ratios[1]:.2f} x | {ratios[2]:.2f} x |")
    return "\n".join(lines)


def measure_all(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Rounds of all variants, in turn."""
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in options.variants}
    for number in range(options.rounds):
        for variant in options.variants:
            results[variant].append(run_child(options, variant))
            latest = results[variant][-1]
            print(
                f"round {number + 1}  {variant:<20} {latest['pairs_per_second']:.3f} pairs/s  "
                f"{latest['peak_gib']:.2f} GiB",
                file=sys.stderr,
            )
    return results


def main() -> None:
    """Alternate the variants and print the table."""
    options = parse_arguments()
    if options.child:
        run = run_transformers if options.child == "transformers" else run_packed
        print(json.dumps(run(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.truncate:
            fitting = Path(folder) / "pairs.jsonl"
            write_fitting_pairs(options, fitting)
            options.data = str(fitting)
        results = measure_all(options)
    text = report(results, options)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

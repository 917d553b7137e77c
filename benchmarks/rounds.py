"""Rounds of own answers on the generated task, whose judge is exact and blind to length: right answers and length.

    python benchmarks/rounds.py --start runs/sft_tiny --output results/rounds --seeds 3

Methods, with and without `--length-control`, several seeds each. Stages run in forks of this process, so that nothing
is imported again; an interrupted benchmark, repeated, resumes. Right answers and lengths are those of greedy answers to
held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import torch

import nemo_lmpo.training
from nemo_lmpo.answers.engine import load_generator
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.cli import ModuleMain
from nemo_lmpo.data.builtin.tiny_task import builtin_rows, is_right
from nemo_lmpo.errors import UserError
from nemo_lmpo.rounds import drive
from nemo_lmpo.rounds.command import build_parser

METHODS = {
    "LMPO": ["--config-name", "lmpo_tiny"],
    "LMPO, released code": ["--config-name", "lmpo_tiny", "compat=released_code"],
    "SimPO": ["--config-name", "simpo_tiny"],
    "DPO": ["--config-name", "dpo_tiny"],
}
TRAINING = (
    *("trainer.max_steps=12", "trainer.val_check_interval=12", "model.global_batch_size=32", "optim.lr=1e-4"),
    *("data.validation.path=builtin:tiny", "data.validation.limit=64", "checkpoint.save_interval=0"),
    *("checkpoint.keep_best=0", "logging.tensorboard=false", "logging.report=false", "logging.progress_bar=false"),
)
SAMPLING = ("--limit", "256", "--max-new-tokens", "40", "--batch-size", "128", "--quiet")
REWARD = "nemo_lmpo.data.builtin.tiny_task:right_or_wrong"


def in_a_fork(name: str, arguments: Sequence[str], processes: int) -> None:
    """As `drive.run_command`, with the imports of this process."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        log = os.open(os.environ["ROUNDS_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            status = ModuleMain(name)(list(arguments))
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if ended:
        raise UserError(f"{name} failed; see {os.environ['ROUNDS_LOG']}")


def measure(model: str, output: Path) -> None:
    """Right answers in percent and mean tokens of greedy answers to the held-out prompts; in a fork, as above."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            generator = load_generator(model, device="cpu")
            prompts = [row["prompt"] for row in builtin_rows("tiny", "test")]
            from nemo_lmpo.data.messages import PLAIN_INPUTS

            ids = generator.encoder.encode_prompts(
                [([{"role": "user", "content": text}], PLAIN_INPUTS) for text in prompts]
            )
            answers = generator.respond([one for one in ids if isinstance(one, list)], Sampling(40, batch_size=128))
            right = 100 * fmean(is_right(text, one.text) for text, one in zip(prompts, answers, strict=True))
            output.write_text(json.dumps({"right": right, "tokens": fmean(one.tokens or 0 for one in answers)}))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def main() -> None:
    """Run what is missing, and print a line for each method, seed and policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    drive.run_command = in_a_fork
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["ROUNDS_LOG"] = str(options.output / "log")
    for seed in range(options.seeds):
        for method, recipe in METHODS.items():
            for control in ([], ["--length-control"]):
                name = f"{method.lower().replace(', ', '_').replace(' ', '_')}{'_lc' if control else ''}-{seed}"
                folder = options.output / name
                given = [*recipe, "--rounds", str(options.rounds), "--output", str(folder), "--reward", REWARD]
                seeds = [
                    "--seeds",
                    *(str(1000 * seed + one) for one in (13, 21, 42, 79, 100)),
                    "--prompts",
                    "builtin:tiny",
                ]
                settings = [f"model.restore_from_path={options.start}", f"model.seed={42 + seed}", *TRAINING]
                drive.run_rounds(build_parser("rounds").parse_args([*given, *seeds, *SAMPLING, *control, *settings]))
                models = [options.start, *(str(folder / f"round_{n}" / "run") for n in range(1, options.rounds + 1))]
                for number, model in enumerate(models):
                    measured = folder / f"measured_{number}.json"
                    if not measured.exists():
                        measure(model, measured)
                found = [json.loads((folder / f"measured_{n}.json").read_text()) for n in range(len(models))]
                line = "  ".join(f"{one['right']:5.1f} % {one['tokens']:5.2f}" for one in found)
                print(f"{method:20} {'LC' if control else '  '} seed {seed}  {line}", flush=True)


if __name__ == "__main__":
    assert nemo_lmpo.training
    main()

"""Rounds of own answers on the generated task, whose judge is exact and blind to length: right answers and length.

    nemo-lmpo train sft_tiny data.train.path=builtin:tiny_sft data.validation.path=builtin:tiny_sft optim.lr=2e-3 \
        trainer.max_steps=125 trainer.val_check_interval=125 run_dir=runs/sft_tiny
    python -m benchmarks.rounds --start runs/sft_tiny --output runs/rounds --jobs 2
    python -m benchmarks.rounds_page --write

First each method gets a learning rate, all by one rule: of `RATES`, the highest whose right sampled answers after one
round are within one standard error of the best rate's. That is on prompts that are neither trained on nor held out,
with a seed that the study does not use and without length control. Then every method runs with several seeds, with and
without `--length-control`. Right answers and lengths are those of greedy and of sampled answers to held-out prompts.

Stages run in forks, so that nothing is imported again; an interrupted benchmark, repeated, resumes. Numbers go to
`benchmarks/results/rounds.json` as they come.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import torch

from benchmarks.rounds_page import METHODS, RESULTS, VALIDATION, selected_rate
from nemo_lmpo.answers.engine import load_generator
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.cli import ModuleMain
from nemo_lmpo.data.builtin.tiny_task import builtin_rows, is_right
from nemo_lmpo.data.messages import PLAIN_INPUTS
from nemo_lmpo.errors import UserError
from nemo_lmpo.pairs.folder import SUMMARY
from nemo_lmpo.rounds import drive
from nemo_lmpo.rounds.command import build_parser
from nemo_lmpo.rounds.numbers import training_of
from nemo_lmpo.runtime.files import read_json, write_json

RECIPES = {  # and overrides
    "LMPO": ["lmpo_tiny"],
    "LMPO, released code": ["lmpo_tiny", "compat=released_code"],
    "SimPO": ["simpo_tiny"],
    "DPO": ["dpo_tiny"],
}
RATES = ("3e-6", "1e-5", "3e-5", "1e-4")
TUNING_SEED = 9
"""Not one of the study's."""
PROMPTS = 256
"""Of the training split that are trained on; those behind them choose the learning rate."""
STEPS, BATCH, NEW_TOKENS = 12, 32, 40
TRAINING = (
    *(f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", f"model.global_batch_size={BATCH}"),
    *("data.validation.path=builtin:tiny", "data.validation.limit=64", "checkpoint.save_interval=0"),
    *("checkpoint.keep_best=0", "logging.tensorboard=false", "logging.report=false", "logging.progress_bar=false"),
)
SAMPLING = ("--limit", str(PROMPTS), "--max-new-tokens", str(NEW_TOKENS), "--batch-size", "128", "--quiet")
WAYS = {
    "greedy": Sampling(NEW_TOKENS, batch_size=128),
    "sampled": Sampling(NEW_TOKENS, temperature=0.8, top_p=0.95, seed=2026, batch_size=128),
}
"""How answers are measured; the second as pairs are sampled."""
REWARD = "nemo_lmpo.data.builtin.tiny_task:right_or_wrong"


IMPORTED = (
    *("datasets", "scipy.stats", "transformers.models.llama.modeling_llama", "transformers.generation.utils"),
    *("nemo_lmpo.pairs.run", "nemo_lmpo.report.plots", "nemo_lmpo.training.session"),
    *("nemo_lmpo.training.start", "nemo_lmpo.training.trainer", "nemo_lmpo.monitor.reporter"),
)
"""Before the forks: they take more time than the work itself."""


@dataclass(frozen=True)
class Run:
    """All rounds of one method with one seed."""

    method: str
    rate: str
    seed: int
    control: bool = False

    @property
    def name(self) -> str:
        """Of its folder and its row in the results."""
        words = [self.method.replace(", ", " ").replace(" ", "_"), "controlled" if self.control else "", self.rate]
        return "-".join([*filter(None, words), str(self.seed)])


def prompts_of(part: str) -> list[str]:
    """The prompts of a part: `held_out`, or `validation`, which chooses learning rates."""
    if part == "held_out":
        return [row["prompt"] for row in builtin_rows("tiny", "test")]
    return [row["prompt"] for row in builtin_rows("tiny", "train", PROMPTS + VALIDATION)[PROMPTS:]]


def in_a_fork(job: Callable[[], int], log: Path, what: str) -> None:
    """Run a job in a fork of this process, on one thread and with its output in a log.

    Raises:
        UserError: it failed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = job()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if ended:
        raise UserError(f"{what} failed; see {log}")


def measure(model: str, part: str, output: Path) -> int:
    """Write right answers in percent and mean tokens of greedy and of sampled answers to the prompts of a part."""
    generator, prompts = load_generator(model, device="cpu"), prompts_of(part)
    encoded = generator.encoder.encode_prompts([([{"role": "user", "content": one}], PLAIN_INPUTS) for one in prompts])
    ids = [one for one in encoded if isinstance(one, list)]
    assert len(ids) == len(prompts)
    found: dict[str, float] = {}
    for way, sampling in WAYS.items():
        answers = generator.respond(ids, sampling)
        right = 100 * fmean(is_right(prompt, one.text) for prompt, one in zip(prompts, answers, strict=True))
        found |= {f"{way}_right": right, f"{way}_tokens": fmean(one.tokens or 0 for one in answers)}
    write_json(output, found)
    return 0


def do_run(run: Run, start: str, output: Path, count: int, part: str) -> list[dict[str, Any]]:
    """All rounds of a run, by the commands of `nemo-lmpo rounds`; what each policy is like, the start model first."""
    folder, log = output / run.name, output / f"{run.name}.log"
    recipe, *overrides = RECIPES[run.method]
    words = ["--config-name", recipe, "--rounds", str(count), "--output", str(folder), "--reward", REWARD]
    words += ["--prompts", "builtin:tiny", *SAMPLING, *(["--length-control"] if run.control else [])]
    words += ["--seeds", *(str(1000 * run.seed + one) for one in (13, 21, 42, 79, 100))]
    settings = [*overrides, f"model.restore_from_path={start}", f"model.seed={42 + run.seed}", f"optim.lr={run.rate}"]
    # Settings come first: behind options they would be read as seeds, or not at all.
    rounds = drive.plan_rounds(build_parser("rounds").parse_args([*settings, *TRAINING, *words]))
    policies = []
    for number in range(count + 1):
        model = rounds.policy_before(number + 1)
        measured = (folder if number else output) / f"{part}_{number}.json"
        if not measured.exists():
            in_a_fork(partial(measure, model, part, measured), log, f"measuring {run.name}")
        policies.append(read_json(measured) | (training_of(rounds.run_dir(number)) if number else {}))
        if number == count:
            break
        if not drive.is_finished(rounds.run_dir(number + 1)):
            for name, arguments in (
                ("pairs", rounds.pairs_arguments(number + 1)),
                ("train", rounds.train_arguments(number + 1)),
            ):
                in_a_fork(partial(ModuleMain(name), arguments), log, f"{name} of {run.name}")
        made = read_json(rounds.pairs_dir(number + 1) / SUMMARY)
        policies[-1] |= {"pairs": made["counts"]["pairs"], "longer_wins": made["statistics"]["longer_wins_pairs"]}
    return policies


def do_runs(
    runs: Iterable[Run],
    options: argparse.Namespace,
    rounds: int,
    part: str,
    keep: Callable[[Run, list[dict[str, Any]]], None],
) -> None:
    """Several runs, so many at a time as wanted."""
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=None) as pool:
        places = (options.start, options.output, rounds, part)
        waiting = {pool.submit(do_run, run, *places): run for run in runs}
        for done in as_completed(waiting):
            policies = done.result()
            keep(waiting[done], policies)
            shown = ("greedy_right", "sampled_right", "greedy_tokens")
            line = "   ".join(" ".join(f"{one[name]:5.1f}" for name in shown) for one in policies)
            print(f"{waiting[done].name:35} {line}", flush=True)


def main() -> None:
    """Run what is missing, and print a line for each run: right greedy and sampled answers, and tokens, by policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", required=True, help="a fine-tuned tiny model")
    parser.add_argument("--output", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on a core each")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in IMPORTED:
        importlib.import_module(name)
    results: dict[str, Any] = {"tuning": {method: {} for method in METHODS}, "rates": {}, "runs": {}}

    def keep_tuning(run: Run, policies: list[dict[str, Any]]) -> None:
        results["tuning"][run.method][run.rate] = policies
        write_json(options.results, results)

    def keep_run(run: Run, policies: list[dict[str, Any]]) -> None:
        named = {"method": run.method, "length_control": run.control, "seed": run.seed, "policies": policies}
        results["runs"][run.name] = named
        write_json(options.results, results)

    tuned = (Run(method, rate, TUNING_SEED) for rate in RATES for method in METHODS)
    do_runs(tuned, options, 1, "validation", keep_tuning)
    results["rates"] = {method: selected_rate(found) for method, found in results["tuning"].items()}
    print(json.dumps(results["rates"]), flush=True)
    study = (
        Run(method, results["rates"][method], seed, control)
        for seed in range(options.seeds)
        for control in (False, True)
        for method in METHODS
    )
    do_runs(study, options, options.rounds, "held_out", keep_run)


if __name__ == "__main__":
    main()

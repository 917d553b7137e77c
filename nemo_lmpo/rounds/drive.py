"""Runs the rounds: every stage is a command in a process of its own, which resumes by itself."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_lmpo.answers.identity import claim_folder
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.pairs import folder as pairs_files
from nemo_lmpo.pairs.options import DECIDE_NOTHING, checked_counts, sampling_of, words_of
from nemo_lmpo.pairs.scorer_choice import check_one_scorer
from nemo_lmpo.report.read import read_run
from nemo_lmpo.rounds.numbers import write_numbers
from nemo_lmpo.rounds.page import write_page
from nemo_lmpo.rounds.plan import SETTINGS, TRAINING, Rounds
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.children import start_following
from nemo_lmpo.runtime.files import directory_lock
from nemo_lmpo.runtime.interruption import Interrupted
from nemo_lmpo.training.preflight import preflight

_OURS = ("model.restore_from_path", "data.train.path", "run_dir", "model.reference_from_path")
"""Settings that differ by round."""
_STANDIN_PAIRS = "builtin:tiny"
"""Rows of the kind that rounds train on, for a first look before there are any."""
_logger = logging.getLogger("nemo_lmpo")


def plan_rounds(options: argparse.Namespace) -> Rounds:
    """What is to be done, everything that is cheap to check looked at.

    Raises:
        ConfigError: names what is wrong.
    """
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds} must be at least 1")
    if options.processes < 1:
        raise ConfigError(f"--processes {options.processes} must be at least 1")
    checked_counts(options)
    sampling_of(options)
    check_one_scorer(options)
    config = load_recipe(options.config_name, options.overrides, config_dir=options.config_dir)
    taken = [word for word in options.overrides if word.partition("=")[0].lstrip("+") in _OURS[1:]]
    if taken:
        raise ConfigError(f"{taken[0]} is set by the rounds themselves; leave it out")
    if config.model.restore_from_path is None:
        raise ConfigError(
            "model.restore_from_path is not set, and random weights answer nothing; give the model to start from, for "
            "example model.restore_from_path=runs/sft_tiny"
        )
    _check_training(options)
    where = ["--config-dir", str(options.config_dir)] if options.config_dir else []
    others = [word for word in options.overrides if word.partition("=")[0].lstrip("+") != _OURS[0]]
    return Rounds(
        options.output,
        options.rounds,
        ["--config-name", options.config_name, *where, *others],
        config.model.restore_from_path,
        words_of(options),
        words_of(options, leave_out=DECIDE_NOTHING),
        config.loss.needs_reference,
        options.reference,
    )


def _check_training(options: argparse.Namespace) -> None:
    """See before anything is sampled that a training can start, but for its pairs.

    Raises:
        UserError: settings, model, tokenizer, template or validation data cannot be used.
    """
    overrides = [*options.overrides, f"data.train.path={_STANDIN_PAIRS}"]
    config = load_recipe(options.config_name, overrides, config_dir=options.config_dir)
    preflight(config, options.processes, fetch=False, owns_directory=False)


def run_rounds(options: argparse.Namespace) -> None:
    """Do what is missing of all rounds, and write the page over them after each.

    Raises:
        UserError: a stage failed; what was made is kept.
    """
    rounds = plan_rounds(options)
    try:
        rounds.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {rounds.folder} cannot be made ({error.strerror}); choose another one") from None
    with directory_lock(rounds.folder, option="--output "):
        _claim(rounds)
        for number in range(1, rounds.count + 1):
            if is_finished(rounds.run_dir(number)):
                continue
            _logger.info("round %d of %d: pairs", number, rounds.count)
            run_command("pairs", rounds.pairs_arguments(number), 1)
            _logger.info("round %d of %d: training", number, rounds.count)
            run_command("train", rounds.train_arguments(number), options.processes)
            if not is_finished(rounds.run_dir(number)):
                raise UserError(
                    f"the training of round {number} ended before its last step; run the same command again to go on"
                )
            write_page(rounds.folder, write_numbers(rounds, number))
        run_command("pairs", rounds.pairs_arguments(rounds.count + 1), 1)
        page = write_page(rounds.folder, write_numbers(rounds, rounds.count + 1))
    _logger.info("all rounds are done: %s", page)


def _claim(rounds: Rounds) -> None:
    """Note what the rounds are made of, or see that it is as before. More of them may be asked for later.

    Nothing binds before it was used: a training that cannot start is corrected without sampling anew.

    Raises:
        ConfigError: other rounds were begun there.
    """
    sampled = pairs_files.is_begun(rounds.pairs_dir(1) / pairs_files.WORK, pairs_files.SAMPLES)
    pairs = {"start": rounds.start, "pairs": list(rounds.deciding_words)}
    claim_folder(rounds.folder, SETTINGS, pairs, "rounds", begun=sampled)
    trained = any((rounds.run_dir(1) / run_files.CHECKPOINTS).glob("step_*"))
    training = {"recipe": list(rounds.recipe), "reference": rounds.reference}
    claim_folder(rounds.folder, TRAINING, training, "rounds", begun=trained)


def is_finished(run_dir: Path) -> bool:
    """Whether a training has made its last step."""
    return (run_dir / run_files.METRICS).is_file() and bool(read_run(run_dir).finished)


def run_command(name: str, arguments: Sequence[str], processes: int) -> None:
    """Run one of our commands in a process of its own, and end it when this one is asked to end.

    Raises:
        UserError: it failed; it has said why.
    """
    module = f"nemo_lmpo.{name}"
    command = [sys.executable, "-m", module, *arguments]
    if processes > 1:
        launcher = Path(sys.executable).with_name("torchrun")
        command = [str(launcher), "--standalone", "--nproc-per-node", str(processes), "-m", module, *arguments]
    with start_following(command) as process:
        try:
            status = process.wait()
        except Interrupted:
            process.terminate()  # a training saves first
            process.wait()
            raise
    if status:
        raise UserError(f"{name} ended with status {status}; what it said is above, and the same command goes on")

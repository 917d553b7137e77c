"""Rounds on a small random model, that tests kill: the command, how far it is, and what must come out the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.training_runs import metrics_of, weights_of
from tests.unit.pairs.models import save_policy

STEPS = 6
_REWARD = """
def short(prompt, answers):
    return [-float(len(answer.split())) for answer in answers]
"""
TRAINING = (
    "model.architecture=null",
    "model.global_batch_size=8",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=3",
    "trainer.num_threads=1",
    "checkpoint.save_interval=2",
    "data.validation.limit=10",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
)


def save_inputs(folder: Path) -> None:
    """What the command reads."""
    save_policy(folder / "policy")
    (folder / "reward.py").write_text(_REWARD)


def command(inputs: Path, rounds: int, limit: int) -> list[str]:
    """Its arguments; the rounds' folder is `out` in the working directory."""
    sampling = ("--limit", str(limit), "--samples", "3", "--max-new-tokens", "60", "--batch-size", "8", "--quiet")
    return [
        *("--config-name", "lmpo_tiny", "--rounds", str(rounds), "--output", "out", "--prompts", "builtin:tiny"),
        *("--reward", f"{inputs}/reward.py:short", *sampling),
        *(f"model.restore_from_path={inputs}/policy", *TRAINING),
    ]


def num_lines(path: Path) -> int:
    """Whole lines of a file that may not be there."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def commands_in(directory: Path) -> list[psutil.Process]:
    """Processes with that working directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def pairs_of(folder: Path) -> dict[str, bytes]:
    """Every file of a pairs folder that a user reads."""
    paths = [*(path for path in folder.iterdir() if path.is_file()), *(folder / "figures").glob("*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if not path.name.startswith(".")}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A journal's rows in the order of their keys: each answer once."""
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: str(row["id"]))


def assert_same_run(first: Path, second: Path) -> None:
    """Metrics but for times, and weights, to the bit."""
    assert metrics_of(first) == metrics_of(second)
    found, expected = weights_of(first, STEPS), weights_of(second, STEPS)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def assert_same_rounds(first: Path, second: Path, rounds: int) -> None:
    """Everything that the command makes."""
    for number in range(1, rounds + 1):
        one, other = first / f"round_{number}", second / f"round_{number}"
        assert pairs_of(one / "pairs") == pairs_of(other / "pairs")
        assert_same_run(one / "run", other / "run")
    folders = [f"round_{number}/pairs" for number in range(1, rounds + 1)] + ["last"]
    for name in (f"{folder}/work/{journal}" for folder in folders for journal in ("samples.jsonl", "scores.jsonl")):
        assert rows_of(first / name) == rows_of(second / name), name
    for name in ("rounds.json", "rounds.html", "rounds.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name

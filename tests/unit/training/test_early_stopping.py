"""A run ends when validations bring nothing better, stays ended on repetition, and goes on where there is patience."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo import training
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.report.read import read_run
from nemo_lmpo.report.summary import state_text
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.trainer import FitResult
from tests.system.processes import SMALL


def trained(folder: Path, *more: str) -> FitResult:
    settings = ("optim.lr=0", "trainer.max_steps=6", "trainer.val_check_interval=1", "checkpoint.save_interval=0")
    config = load_recipe("simpo_tiny", [*SMALL, *settings, f"run_dir={folder}", *more])
    return training.run(config, LaunchInfo())


def said_of(folder: Path) -> tuple[str, bool | None]:
    """The state on the report's page, with the loss by name, and whether nothing is left to do."""
    run = read_run(folder)
    best = run.metrics.series["val/loss"].values[0]
    return state_text(run)[0].replace(f"{best:.4g}", "LOSS"), run.finished


def test_patience_needs_validations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early_stopping_patience=2 counts validations"):
        trained(tmp_path, "trainer.early_stopping_patience=2", "data.validation.path=null")


def test_patience(tmp_path: Path) -> None:
    # Nothing is learned, so the first validation stays the best.
    run = tmp_path / "run"
    for _ in range(2):
        assert trained(run, "trainer.early_stopping_patience=2") == FitResult(3, None, early=True)
        assert said_of(run) == (
            "Stopped early: 3 of 6 steps; no better val/loss than LOSS in the last 2 validations",
            True,
        )
    assert trained(run, "trainer.early_stopping_patience=4") == FitResult(5, None, early=True)
    assert said_of(run) == ("Stopped early: 5 of 6 steps; no better val/loss than LOSS in the last 4 validations", True)
    assert trained(run) == FitResult(6, None, early=False)
    assert said_of(run) == ("Finished: 6 of 6 steps", True)

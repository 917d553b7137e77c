"""A run ends when validations bring nothing better, stays ended on repetition, and goes on where there is patience."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo import training
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.system.processes import SMALL


def trained(folder: Path, *more: str) -> tuple[int, bool]:
    settings = ("optim.lr=0", "trainer.max_steps=6", "trainer.val_check_interval=1", "checkpoint.save_interval=0")
    config = load_recipe("simpo_tiny", [*SMALL, *settings, f"run_dir={folder}", *more])
    result = training.run(config, LaunchInfo())
    assert result.stopped_by is None
    return result.step, result.early


def test_patience_needs_validations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="early_stopping_patience=2 counts validations"):
        trained(tmp_path, "trainer.early_stopping_patience=2", "data.validation.path=null")


def test_patience(tmp_path: Path) -> None:
    # Nothing is learned, so the first validation stays the best.
    run = tmp_path / "run"
    assert trained(run, "trainer.early_stopping_patience=2") == (3, True)
    assert trained(run, "trainer.early_stopping_patience=2") == (3, True)
    assert trained(run, "trainer.early_stopping_patience=4") == (5, True)
    assert trained(run) == (6, False)

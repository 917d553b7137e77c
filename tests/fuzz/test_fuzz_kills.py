"""Kills at every operation on files (conversions), or every other (exports), and at every step of a run of SFT.

The same command completes them.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nemo_lmpo.formats import outputs
from tests.system.processes import training
from tests.system.test_kill import assert_alike, being_written, finish, num_lines, sft_command
from tests.system.test_killed_exports import CONVERSIONS, kill_an_export, kill_conversions, models

__all__ = ["models"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("case", "exchange"), CONVERSIONS)
def test_a_conversion_killed_at_every_operation(
    case: str, exchange: bool, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    kill_conversions(case, models, tmp_path / "place", stride=1, exchange=exchange, every=True)


@pytest.mark.timeout(3600)
def test_an_export_of_a_run_killed_at_every_other_operation(tmp_path: Path) -> None:
    # A file is three operations (open, fsync, replace), so 2 meets each kind; 1 is twenty minutes on a busy machine.
    assert kill_an_export(tmp_path / "run", stride=2, every=True) > 40


STARTS = (0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Seconds behind a start at which it is killed: while it reads settings, tokenizes, builds the model."""


def kill_when(command: tuple[str, ...], directory: Path, *, lines: int, saving: bool = False) -> bool:
    """Kill a run when so many steps are in its metrics, or a checkpoint is being written behind them."""
    left_over, deadline = being_written(directory), time.monotonic() + 120
    with training(command, directory) as process:
        while process.is_alive() and time.monotonic() < deadline:
            if num_lines(directory) >= lines and (not saving or being_written(directory) - left_over):
                break
            time.sleep(0.001)
        killed = process.is_alive() and num_lines(directory) <= lines + 2
        process.kill()
        process.join()
    return killed


@pytest.mark.timeout(3600)
def test_sft_on_conversations_killed_at_every_step(tmp_path: Path) -> None:
    """And while each checkpoint is written, and at several moments of a start."""
    steps = 12
    command = sft_command(tmp_path, f"trainer.max_steps={steps}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    finish(whole, command)
    for seconds in STARTS:
        if num_lines(killed):
            break  # it trains already
        with training(command, killed) as process:
            process.join(timeout=seconds)
            process.kill()
            process.join()
    kills = while_saving = 0
    for lines in range(1, steps + 1):
        kills += kill_when(command, killed, lines=lines)
        if lines % 2 and lines < steps:  # a checkpoint is written behind the next step
            kills += kill_when(command, killed, lines=lines, saving=True)
            while_saving += bool(being_written(killed))
    assert kills >= steps
    assert while_saving >= 2
    finish(killed, command)
    assert_alike(killed, whole, steps)

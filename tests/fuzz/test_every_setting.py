"""Every setting and every loss's option with odd values: what is accepted trains a step and saves, or is refused.

The slice in the unit tests (`tests/unit/config/test_senseless_values.py`) asks only whether values are accepted.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_lmpo.config.recipe import compose, config_from_mapping
from nemo_lmpo.config.rules import check_settings
from nemo_lmpo.errors import UserError
from nemo_lmpo.train import main
from tests.unit.config.senseless import all_fields, with_value

SMALL = {
    "model.architecture.hidden_size": 64,
    "model.architecture.intermediate_size": 128,
    "model.architecture.num_hidden_layers": 2,
    "model.global_batch_size": 2,
    "data.train.limit": 6,
    "data.validation.limit": 2,
    "trainer.max_steps": 1,
    "logging.progress_bar": False,
    "logging.report": False,
    "logging.tensorboard": False,
}
ODD: tuple[Any, ...] = (
    -1,
    0,
    1,
    2,
    3,
    7,
    0.5,
    -0.5,
    1e-30,
    1e6,
    2**31,
    2**63 - 1,
    math.inf,
    math.nan,
    True,
    False,
    None,
    "odd",
    "32",
    [],
)
LONG_RUNS = {"trainer.max_steps", "trainer.max_epochs"}
"""A large number of these is a long run, not a wrong one."""
ENDS_THE_PROCESS = "trainer.step_timeout"
"""A small one ends a healthy run, and this process with it, as documented (`tests/system/test_watchdog.py`)."""


def small_run() -> dict[str, Any]:
    """Plain settings of a run of one step."""
    raw = compose("lmpo_tiny")
    for key, value in SMALL.items():
        raw = with_value(raw, key, value)
    return raw


def accepted() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is called valid, by a name for messages."""
    small = small_run()
    for loss, key, _ in all_fields():
        for value in ODD:
            if key in LONG_RUNS and isinstance(value, int | float) and 7 < value < math.inf:
                continue
            if key == ENDS_THE_PROCESS and isinstance(value, int | float) and 0 < value < 60:
                continue
            raw = with_value({**small, "loss": {"name": loss}}, key, value)
            with contextlib.suppress(UserError):
                check_settings(config_from_mapping(raw))
                yield f"{loss} {key}={value!r}", raw


def outcome(raw: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with the way a run ends; None: it was refused in sentences, or trained."""
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"run_dir": f"runs/{name}", **raw}))
    try:
        status = main(["--config-dir", ".", "--config-name", name])
    except Exception:
        return traceback.format_exc(limit=-2)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if status not in (0, 1) or bool(status) != bool(errors):
        return f"status {status}, {errors}"
    return next((f"unreadable: {line!r:.200}" for line in errors if not line.isprintable() or len(line) > 600), None)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.timeout(7200)
def test_what_is_accepted_starts(capsys: pytest.CaptureFixture[str]) -> None:
    findings, tried = [], 0
    for name, raw in accepted():
        tried += 1
        problem = outcome(raw, f"case{tried}", capsys)
        if problem is not None:
            findings.append(f"{name}: {problem}")
    assert tried > 500
    assert not findings, f"{len(findings)} of {tried}\n" + "\n".join(findings)


def test_a_run_of_these_sizes_trains(capsys: pytest.CaptureFixture[str]) -> None:
    """Else every case would be refused for its sizes."""
    assert outcome(small_run(), "small", capsys) is None
    assert Path("runs/small/checkpoints").is_dir()

"""What torch is told before NCCL starts: the recorder is on, and its watchdogs come after the run's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.rules import check_settings
from nemo_lmpo.config.rules.settings import LEAST_SLACK
from nemo_lmpo.config.schema import TrainerConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.monitor import watchdog
from nemo_lmpo.runtime.flight_recorder import record_collectives


@pytest.mark.parametrize(("step", "collective"), [(3600.0, 5400.0), (10.0, 70.0), (None, 600.0)])
def test_every_other_watchdog_comes_later(step: float | None, collective: float, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    record_collectives(tmp_path / "hang", step_timeout=step, collective_timeout=collective, environ=environ)
    assert int(environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > max(collective, step or 0.0)
    assert int(environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    # torch appends the rank.
    assert environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "hang" / "collectives_")


def test_what_the_user_set_stays_and_the_next_run_has_its_own(tmp_path: Path) -> None:
    environ = {"TORCH_FR_BUFFER_SIZE": "7"}
    for run in ("a", "b"):
        record_collectives(tmp_path / run, step_timeout=1.0, collective_timeout=2.0, environ=environ)
        assert environ["TORCH_FR_BUFFER_SIZE"] == "7"
        assert environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / run / "collectives_")


def test_the_defaults_are_in_order() -> None:
    trainer = TrainerConfig()
    assert trainer.step_timeout is not None
    ours = trainer.step_timeout + watchdog._GRACE_SECONDS + watchdog._LINGER_SECONDS
    assert ours < 60 * trainer.distributed_timeout
    assert watchdog._GRACE_SECONDS + watchdog._LINGER_SECONDS < LEAST_SLACK


@pytest.mark.parametrize(("step", "minutes", "least"), [(3600.0, 30.0, 61), (3600.0, 60.9, 61), (1.0, 0.5, 2)])
def test_the_wrong_order_is_refused(step: float, minutes: float, least: int) -> None:
    times = (f"trainer.step_timeout={step}", f"trainer.distributed_timeout={minutes}")
    with pytest.raises(ConfigError, match=rf"distributed_timeout={minutes:g} minutes .*_timeout={least} or more"):
        check_settings(load_recipe("lmpo_tiny", times))
    check_settings(load_recipe("lmpo_tiny", [times[0], f"trainer.distributed_timeout={least}"]))
    check_settings(load_recipe("lmpo_tiny", ["trainer.step_timeout=null", times[1]]))

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.config.schema import LoggingConfig
from nemo_lmpo.errors import UserError
from nemo_lmpo.report.read import Series, read_config, read_metrics, read_run


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_columns_by_rising_step_and_the_last_value_of_a_step_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        {"step": 1, "time": 10.0, "loss": 3.0},
        {"step": 2, "time": 20.0, "loss": 2.0, "lr": 0.1},
        {"step": 2, "time": 21.0, "val/loss": 2.5},
        {"step": 1, "time": 30.0, "loss": 4.0},
    )
    metrics = read_metrics(path)
    assert metrics.get("loss") == Series([1, 2], [4.0, 2.0])
    assert metrics.get("lr") == Series([2], [0.1])
    assert metrics.get("val/loss") == Series([2], [2.5])
    assert metrics.get("absent") is None
    assert (metrics.last_step, metrics.last_time) == (2, 30.0)


@pytest.mark.parametrize(
    "broken", ['{"step": 3, "lo', "\x00\x00", "[1, 2]\n", '{"loss": 1}\n', '{"step": null}\n', "\n"]
)
def test_broken_lines_are_passed_over(tmp_path: Path, broken: str) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, broken)
    assert read_metrics(path).get("loss") == Series([1, 2], [3.0, 2.0])


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    values = ["NaN", "Infinity", "-Infinity", None, 1.5]
    path = write(tmp_path / "metrics.jsonl", *({"step": step, "loss": v} for step, v in enumerate(values, 1)))
    series = read_metrics(path).series["loss"]
    assert math.isnan(series.values[0])
    assert series.values[1:3] == [math.inf, -math.inf]
    assert math.isnan(series.values[3])
    assert series.finite() == Series([5], [1.5])


def test_a_metric_that_is_never_finite_counts_as_absent(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": "NaN"})
    assert read_metrics(path).get("loss") is None


def test_text_under_a_metric_name_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0, "note": "text", "list": [1]})
    assert set(read_metrics(path).series) == {"loss"}


def test_reads_what_the_log_writes(tmp_path: Path) -> None:
    from nemo_lmpo.monitor.metrics_log import MetricsLog

    with closing(
        MetricsLog(tmp_path, LoggingConfig(tensorboard=False), settings={}, resume_step=0, total_steps=2)
    ) as log:
        log.log(1, {"loss": 0.5, "grad_norm": math.inf})
        log.log(1, {"loss": 0.75}, prefix="val/")
    run = read_run(tmp_path)
    assert run.metrics.get("loss") == Series([1], [0.5])
    assert run.metrics.get("val/loss") == Series([1], [0.75])
    assert run.metrics.series["grad_norm"] == Series([1], [math.inf])
    assert (run.total_steps, run.finished) == (2, False)


@pytest.mark.parametrize("content", ["", "\n", '{"step": 1, "time": 2.0}\n', '{"step": 1'])
def test_file_without_metrics_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl has no metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_missing_file_and_missing_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a directory"):
        read_run(tmp_path / "nowhere")


def test_run_is_named_by_its_recipe_or_directory(make_run: Callable[..., Path]) -> None:
    assert read_run(make_run()).label == "lmpo_example"
    assert read_run(make_run(name="other", config=None)).label == "other"


@pytest.mark.parametrize(
    ("steps", "total", "config", "finished"),
    [
        (40, 40, None, True),
        (39, 40, None, False),
        (40, None, "trainer: {max_steps: 40}", True),
        (40, None, "trainer: {max_steps: 41}", False),
        (40, None, "trainer: {max_steps: null}", None),
        (40, None, None, None),
    ],
)
def test_finished(
    make_run: Callable[..., Path], steps: int, total: int | None, config: str | None, finished: bool | None
) -> None:
    assert read_run(make_run(steps=steps, total=total, config=config)).finished is finished


@pytest.mark.parametrize("content", ["a: [1, 2", "- 1\n- 2\n", ""])
def test_config_that_cannot_be_read_is_left_out(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert read_config(tmp_path) == {}

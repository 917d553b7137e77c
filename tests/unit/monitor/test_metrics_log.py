from __future__ import annotations

import json
import math
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, Never, cast

import pytest
import torch  # before the tests, in which nothing may be started

from nemo_lmpo.config.schema import LoggingConfig, MlflowConfig, WandbConfig
from nemo_lmpo.errors import ConfigError, TrainingError
from nemo_lmpo.monitor.metrics_log import MetricsLog, encode_number, truncate_metrics
from nemo_lmpo.monitor.samples import Sample

QUIET = LoggingConfig(tensorboard=False)
WANDB = LoggingConfig(tensorboard=False, wandb=WandbConfig(project="p", entity="e"))


def open_log(
    run_dir: Path, *, resume_step: int = 0, config: LoggingConfig = QUIET, total_steps: int | None = None
) -> MetricsLog | None:
    return MetricsLog(run_dir, config, settings={"name": "t"}, resume_step=resume_step, total_steps=total_steps)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_time(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "time"} for entry in entries]


def write_steps(log: MetricsLog, first: int, last: int, validate_every: int = 2) -> None:
    for step in range(first, last + 1):
        log.log(step, {"loss": 1.0 / step, "lr": 1e-6})
        if step % validate_every == 0:
            log.log(step, {"loss": 2.0 / step}, prefix="val/")


def test_one_line_a_step_in_the_order_given(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        log.log(1, {"rewards/margins": 0.5, "loss": 2.0})
        log.log(1, {"loss": 3.0}, prefix="val/")
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    entries = lines(tmp_path)
    assert [list(entry) for entry in entries] == [
        ["step", "time", "rewards/margins", "loss"],
        ["step", "time", "val/loss"],
    ]
    assert without_time(entries) == [{"step": 1, "rewards/margins": 0.5, "loss": 2.0}, {"step": 1, "val/loss": 3.0}]
    assert entries[0]["time"] > 1.7e9


def test_resumed_file_equals_uninterrupted_one(tmp_path: Path) -> None:
    with closing(open_log(tmp_path / "whole")) as log:
        write_steps(log, 1, 8)
    with closing(open_log(tmp_path / "cut")) as log:
        write_steps(log, 1, 6)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with closing(open_log(tmp_path / "cut", resume_step=3)) as log:
        write_steps(log, 4, 8)
    assert without_time(lines(tmp_path / "cut")) == without_time(lines(tmp_path / "whole"))


def test_resume_step_keeps_its_own_lines_and_does_not_repeat_them(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        write_steps(log, 1, 4)
    with closing(open_log(tmp_path, resume_step=4)) as log:
        log.log(4, {"loss": 9.0}, prefix="val/")  # a trainer that validates again where it resumes
        log.log(5, {"loss": 0.2})
    entries = without_time(lines(tmp_path))
    assert [entry["step"] for entry in entries] == [1, 2, 2, 3, 4, 4, 5]
    assert {"step": 4, "val/loss": 0.5} in entries


def test_validation_missing_at_the_resume_step_is_written(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        log.log(1, {"loss": 1.0})
    with closing(open_log(tmp_path, resume_step=1)) as log:
        log.log(1, {"loss": 5.0}, prefix="val/")
    assert without_time(lines(tmp_path)) == [{"step": 1, "loss": 1.0}, {"step": 1, "val/loss": 5.0}]


def test_new_run_removes_lines_of_an_earlier_one(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        write_steps(log, 1, 3)
    with closing(open_log(tmp_path, resume_step=0)):
        pass
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "broken",
    [
        b'{"step": 3, "loss": 0.1',
        b'{"step": 3, "loss": 0.1}',
        b"\xff\xfe",
        b"[1]\n",
        b'{"loss": 1}\n',
        b'{"step": "3"}\n',
    ],
    ids=["cut", "no newline", "no text", "no object", "no step", "step is text"],
)
def test_broken_last_line_is_removed(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    path.write_bytes(good + broken)
    assert truncate_metrics(path, 10) == set()
    assert path.read_bytes() == good
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_unchanged_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    inode = path.stat().st_ino
    assert truncate_metrics(path, 1) == {""}
    assert path.stat().st_ino == inode


def test_values_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        log.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: Any) -> Never:
        raise AssertionError(f"{constant} is not JSON")

    entry = json.loads(text, parse_constant=refuse)
    assert (entry["loss"], entry["grad_norm"], entry["lr"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(entry["loss"]))
    assert float(entry["grad_norm"]) == math.inf


def test_encode_number_takes_what_float_takes() -> None:
    assert encode_number(cast(Any, torch.tensor(1.5))) == 1.5
    assert encode_number(3) == 3.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log._file.close()
    log._file = open("/dev/full", "ab")  # noqa: PTH123, SIM115
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl.*No space left"):
        log.log(1, {"loss": 1.0})


def test_total_steps_are_kept_for_the_report(tmp_path: Path) -> None:
    open_log(tmp_path, total_steps=478).close()
    assert json.loads((tmp_path / "run.json").read_text()) == {"total_steps": 478}


def tensorboard_points(run_dir: Path, tag: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_has_the_interval_and_forgets_steps_after_the_resumed_one(tmp_path: Path) -> None:
    config = LoggingConfig(log_interval=2)
    with closing(open_log(tmp_path, config=config)) as log:
        for step in range(1, 8):
            log.log(step, {"loss": 10.0 + step})
    # Steps 1, 2, 4, 6: the first one and every second.
    assert tensorboard_points(tmp_path, "loss") == [(1, 11.0), (2, 12.0), (4, 14.0), (6, 16.0)]
    with closing(open_log(tmp_path, config=config, resume_step=3)) as log:
        for step in range(4, 7):
            log.log(step, {"loss": 20.0 + step})
        log.log(5, {"loss": 1.0}, prefix="val/")
    assert tensorboard_points(tmp_path, "loss") == [(1, 11.0), (2, 12.0), (4, 24.0), (6, 26.0)]
    assert tensorboard_points(tmp_path, "val/loss") == [(5, 1.0)]


SAMPLES = [Sample("<user> a\n| b", "x\u2028y \u00e9", 3, True), Sample("<user> c", "", 8, False)]


def lines_of_samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_bytes().splitlines()]


def test_samples_are_a_line_an_answer(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        assert not (tmp_path / "samples.jsonl").exists()
        log.log_samples(0, SAMPLES)
        log.log_samples(25, SAMPLES[1:])
    assert lines_of_samples(tmp_path) == [
        {"step": 0, "prompt_index": 0, **vars(SAMPLES[0])},
        {"step": 0, "prompt_index": 1, **vars(SAMPLES[1])},
        {"step": 25, "prompt_index": 0, **vars(SAMPLES[1])},
    ]


def sampled_steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in lines_of_samples(run_dir)]


def test_samples_of_a_resumed_run(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        for step in (0, 2, 4):
            log.log_samples(step, SAMPLES)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 1, "prom')
    with closing(open_log(tmp_path, resume_step=2)) as log:
        assert sampled_steps(tmp_path) == [0, 0, 2, 2]
        log.log_samples(2, SAMPLES)  # a trainer that validates again where it resumes
        log.log_samples(3, SAMPLES)
    assert sampled_steps(tmp_path) == [0, 0, 2, 2, 3, 3]
    # A run that begins anew may have another start model.
    with closing(open_log(tmp_path, resume_step=0)) as log:
        log.log_samples(0, SAMPLES[1:])
    assert lines_of_samples(tmp_path) == [{"step": 0, "prompt_index": 0, **vars(SAMPLES[1])}]


def test_samples_that_cannot_be_written_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(open_log(tmp_path)) as log:
        (tmp_path / "samples.jsonl").mkdir()
        for step in (2, 4):
            log.log_samples(step, SAMPLES)
    (record,) = caplog.records
    assert re.search(r"writing .*samples\.jsonl failed.*training continues: free the disk", record.getMessage())


def test_tensorboard_has_the_answers_and_forgets_those_after_the_resumed_step(tmp_path: Path) -> None:
    # The one that TensorBoard itself reads with; its older one forgets no texts.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    with closing(open_log(tmp_path, config=LoggingConfig())) as log:
        for step in (0, 2, 4):
            log.log_samples(step, SAMPLES)
    with closing(open_log(tmp_path, config=LoggingConfig(), resume_step=2)) as log:
        log.log_samples(4, [SAMPLES[1]])
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    texts = {
        index: [(event.step, event.tensor_proto.string_val[0].decode()) for event in accumulator.Tensors(tag)]
        for index in (0, 1)
        if (tag := f"val/samples/{index}/text_summary")
    }
    answered = "Prompt\n\n    <user> a\n    | b\n\nAnswer (3 tokens)\n\n    x\n    y \u00e9"
    cut = "Prompt\n\n    <user> c\n\nAnswer (8 tokens, cut)\n\n    "
    assert texts == {0: [(0, answered), (2, answered), (4, cut)], 1: [(0, cut), (2, cut)]}


def test_an_early_stop_is_kept_until_the_run_goes_on(tmp_path: Path) -> None:
    with closing(open_log(tmp_path, total_steps=9)) as log:
        log.note_early_stop({"step": 3})
    assert json.loads((tmp_path / "run.json").read_text()) == {"total_steps": 9, "stopped_early": {"step": 3}}
    open_log(tmp_path, total_steps=9, resume_step=3).close()
    assert json.loads((tmp_path / "run.json").read_text()) == {"total_steps": 9}


@pytest.mark.parametrize(
    ("package", "config", "setting"),
    [
        ("wandb", WANDB, "logging.wandb.project='p'"),
        ("mlflow", LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e")), "logging.mlflow.experiment='e'"),
    ],
)
def test_missing_package_says_what_to_do_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, config: LoggingConfig, setting: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{re.escape(setting)} needs.*pip install 'nemo-lmpo\[{package}\]'"):
        open_log(tmp_path / "r", config=config)
    assert not (tmp_path / "r").exists()


def test_wandb_that_cannot_start_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**settings: Any) -> Never:
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"api_key not configured.*wandb login"):
        open_log(tmp_path, config=WANDB)


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.close()
    log.close()

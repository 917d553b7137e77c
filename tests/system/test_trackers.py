"""W&B and MLflow themselves, without a server: both start programs of their own."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from nemo_lmpo.config.schema import LoggingConfig, MlflowConfig, WandbConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.monitor.metrics_log import MetricsLog
from nemo_lmpo.monitor.samples import Sample

SAMPLES = [Sample("<user> a", "b", 2, True), Sample("<user> c", "d d", 3, False)]


def open_log(run_dir: Path, config: LoggingConfig, *, resume_step: int = 0) -> MetricsLog | None:
    return MetricsLog(run_dir, config, settings={"name": "t"}, resume_step=resume_step)


WANDB = LoggingConfig(tensorboard=False, wandb=WandbConfig(project="p", entity="e"))


def offline_runs(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "wandb").glob("offline-run-*"))


def test_wandb_run_is_resumed_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with closing(open_log(tmp_path / "r", WANDB)) as log:
        log.log(1, {"loss": 1.0})
        log.log(1, {"loss": 2.0}, prefix="val/")
        log.log_samples(1, SAMPLES)
    run_id = (tmp_path / "r" / "wandb_id").read_text().strip()
    first = offline_runs(tmp_path / "r")
    assert len(first) == 1
    assert first[0].endswith(run_id)
    open_log(tmp_path / "r", WANDB, resume_step=1).close()
    assert all(name.endswith(run_id) for name in offline_runs(tmp_path / "r"))
    assert (tmp_path / "r" / "wandb_id").read_text().strip() == run_id
    contents = [path.read_bytes() for path in (tmp_path / "r" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert any(b"val/loss" in content for content in contents)
    (table,) = [json.loads(path.read_text()) for path in (tmp_path / "r" / "wandb").rglob("*.table.json")]
    assert table["columns"] == ["step", "prompt", "answer", "tokens", "finished"]
    assert table["data"] == [[1, "<user> a", "b", 2, True], [1, "<user> c", "d d", 3, False]]


def test_mlflow_has_the_metrics_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    config = LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e", tracking_uri=uri))
    with closing(open_log(tmp_path / "r", config)) as log:
        log.log(1, {"loss": 1.5})
        log.log(1, {"loss": 2.0}, prefix="val/")
        log.log_samples(1, SAMPLES)
        log.log_samples(2, SAMPLES)  # behind the newest checkpoint
    with closing(open_log(tmp_path / "r", config, resume_step=1)) as log:
        log.log(2, {"loss": 0.5})
        log.log_samples(2, SAMPLES[:1])
    run_id = (tmp_path / "r" / "mlflow_id").read_text().strip()
    client = tracking.MlflowClient(uri)
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")] == [(1, 1.5), (2, 0.5)]
    assert client.get_run(run_id).data.metrics["val/loss"] == 2.0
    assert client.get_run(run_id).data.params == {"name": "t"}
    assert client.get_run(run_id).info.status == "FINISHED"
    files = [client.download_artifacts(run_id, f"samples/step_000000{step}.json", str(tmp_path)) for step in (1, 2)]
    assert [json.loads(Path(file).read_text()) for file in files] == [
        {"step": step, "samples": [vars(sample) for sample in samples]}
        for step, samples in ((1, SAMPLES), (2, SAMPLES[:1]))
    ]


def test_mlflow_without_a_server_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = LoggingConfig(tensorboard=False, mlflow=MlflowConfig("e"))
    with pytest.raises(ConfigError, match=r"set logging\.mlflow\.tracking_uri or MLFLOW_TRACKING_URI"):
        open_log(tmp_path, config)

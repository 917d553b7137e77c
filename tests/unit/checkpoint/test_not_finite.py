"""NaN and infinity never become the newest checkpoint, nor an export: the last good one is kept and resumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.checkpoint import manager as manager_module
from nemo_lmpo.errors import CheckpointError, TrainingError
from nemo_lmpo.formats.conversion import plan, write_huggingface, write_nemo
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.runtime.run_files import saved_steps
from nemo_lmpo.training import trainer as trainer_module
from nemo_lmpo.training.session import TrainingSession
from tests.unit.checkpoint.runs import fingerprint, one_process, open_session, train


@pytest.fixture(autouse=True, scope="module")
def place() -> Iterator[Any]:
    with one_process() as place:
        yield place


def weight(session: TrainingSession) -> torch.Tensor:
    found: torch.Tensor = dict(session.policy.models[0].named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
    return found


def moment(name: str) -> Callable[[TrainingSession], torch.Tensor]:
    def find(session: TrainingSession) -> torch.Tensor:
        (inner,) = session.optimizer.chained_optimizers
        found: torch.Tensor = inner.optimizer.state[inner.optimizer.param_groups[0]["params"][-1]][name]
        return found

    return find


PLACES = {"weight": weight, "exp_avg": moment("exp_avg"), "exp_avg_sq": moment("exp_avg_sq")}


def break_after(monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[], None]) -> None:
    """Spoil the policy as soon as it has finished a step."""
    module: Any = trainer_module
    seen, optimizer_step = [0], module.clip_and_step

    def step_and_spoil(*arguments: Any) -> None:
        optimizer_step(*arguments)
        seen[0] += 1
        if seen[0] == step:
            spoil()

    monkeypatch.setattr(trainer_module, "clip_and_step", step_and_spoil)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", PLACES)
def test_the_last_good_checkpoint_is_kept_and_resumes(
    place: Any, where: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The middle one in the background: it is made visible before the next one is looked at.
    session = open_session(place, tmp_path / "run", "checkpoint.async_save=true")

    def spoil() -> None:
        with torch.no_grad():
            PLACES[where](session).view(-1)[-1] = value

    break_after(monkeypatch, 3, spoil)
    named = "decoder.layers.mlp.linear_fc2.weight" if where == "weight" else f"optimizer.state.{where}"
    with pytest.raises(TrainingError, match=rf"(?s)after step 3 .*{named}.*step_0000002 is kept: run the same") as info:
        session.train(0.0)
    assert str(info.value).isprintable()
    assert "(1 of " in str(info.value)
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step_0000001", "step_0000002"]
    monkeypatch.undo()
    again = train(place, tmp_path / "run")
    assert fingerprint(again) == fingerprint(train(place, tmp_path / "whole"))


def test_margin_statistics_count_too(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(place, tmp_path / "run")
    statistics = session.policy.statistics
    assert statistics is not None
    good = statistics.state_dict
    monkeypatch.setattr(statistics, "state_dict", lambda: {**good(), "mean": math.nan})
    with pytest.raises(TrainingError, match="the margin statistics; it was not saved, and there is no earlier"):
        session.train(0.0)
    assert saved_steps(tmp_path / "run" / "checkpoints") == []


@pytest.fixture
def broken_run(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose newest checkpoint was saved without looking, as earlier versions did."""
    session = open_session(place, tmp_path / "run")

    def spoil() -> None:
        with torch.no_grad():
            weight(session)[0, 0] = math.nan

    break_after(monkeypatch, 3, spoil)
    monkeypatch.setattr(manager_module, "find_not_finite", lambda *_: None)
    session.train(0.0)
    monkeypatch.undo()
    return tmp_path / "run"


def test_an_older_one_that_holds_nan_is_named(place: Any, broken_run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step_0000003 holds NaN or infinity in .*linear_fc2.*remove it"):
        train(place, broken_run, "trainer.max_steps=4")
    assert saved_steps(broken_run / "checkpoints") == [1, 2, 3]


@pytest.mark.parametrize(("name", "write"), [("hf", write_huggingface), ("m.nemo", write_nemo), ("tree", write_nemo)])
def test_nothing_is_exported(name: str, write: Callable[..., None], broken_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    model = open_model(broken_run / "checkpoints" / "step_0000003")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        write(plan(model, out / name))
    assert list(out.iterdir()) == []


def test_the_policy_in_training_is_not_written_as_a_model(place: Any, tmp_path: Path) -> None:
    session = open_session(place, tmp_path / "run")
    with torch.no_grad():
        weight(session)[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        session.files.save_to(tmp_path / "out" / "m.nemo")
    assert list((tmp_path / "out").iterdir()) == []

"""The reference model of DPO, IPO and KTO: computed before training and cached, or in memory."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any, Never

import numpy as np
import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.order import PairSampler
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.fingerprint import weights_fingerprint
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.reference import ReferenceKey, read_entry, write_entry
from nemo_lmpo.training.session import open_session
from nemo_lmpo.training.start_model import find_start_model

OVERRIDES = [
    "model.global_batch_size=8",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "data.train.limit=24",
    "data.validation.limit=10",
    "trainer.max_steps=3",
    "trainer.num_threads=1",
    "checkpoint.save_interval=0",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
]


class Trainer:
    """Trains in this process and keeps the metrics of steps."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    def config(self, *overrides: Any, recipe: str = "dpo_tiny", run: str = "run") -> Config:
        where = [f"run_dir={self.tmp_path / run}", f"data.cache_dir={self.tmp_path / 'cache'}"]
        return load_recipe(recipe, [*OVERRIDES, *where, *overrides])

    def train(self, *overrides: Any, **names: Any) -> dict[Any, Any]:
        config = self.config(*overrides, **names)
        with open_session(config, LaunchInfo()) as session:
            self.pairs = [session.data.train[index] for index in range(len(session.data.train))]
            session.train(0.0)
        lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line for line in lines if "loss" in line}

    def entries(self) -> list[Path]:
        return sorted(path for path in (self.tmp_path / "cache" / "reference").glob("*") if path.is_dir())


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def test_first_step_starts_at_the_reference(trainer: Trainer) -> None:
    first = trainer.train()[1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    of_step = PairSampler(24, 8, seed=42).pairs_of_step(0)
    sums = [trainer.pairs[index].responses[0].reference_logp for index in of_step]
    assert first["logps/chosen_sum"] == pytest.approx(np.mean(sums), rel=1e-6)
    assert len(trainer.entries()) == 2  # training and validation


@pytest.mark.parametrize(
    ("recipe", "loss"),
    [("dpo_tiny", ()), ("dpo_tiny", ("loss.ld_alpha=0.3",)), ("ipo_tiny", ()), ("kto_tiny", ())],
    ids=["dpo", "ld_dpo", "ipo", "kto"],
)
def test_in_memory_is_the_same(trainer: Trainer, recipe: str, loss: tuple[Any, ...]) -> None:
    cached = trainer.train(*loss, recipe=recipe)
    in_memory = trainer.train(*loss, "model.reference_in_memory=true", recipe=recipe, run="other")
    for step in (1, 2, 3):
        assert in_memory[step]["loss"] == pytest.approx(cached[step]["loss"], abs=1e-6)
        assert in_memory[step]["rewards/chosen"] == pytest.approx(cached[step]["rewards/chosen"], abs=1e-5)


def test_ld_dpo_of_one_is_dpo_and_shares_its_cache(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer.train()
    monkeypatch.setattr("nemo_lmpo.training.reference.ReferenceLogps._compute", _must_not_run)
    assert trainer.train("loss.ld_alpha=1", run="one")[3]["loss"] == pytest.approx(plain[3]["loss"], abs=1e-6)
    half = trainer.train("loss.ld_alpha=0.5", run="half")
    assert half[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(half[3]["rewards/margins"] - plain[3]["rewards/margins"]) > 1e-4


@pytest.mark.parametrize("kind", ["false", "true"])
def test_resume_goes_on_with_the_start_as_reference(
    trainer: Trainer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    override = f"model.reference_in_memory={kind}"
    saving = ("checkpoint.save_interval=1", "checkpoint.keep_last=3")
    whole = trainer.train(override, *saving, run="cut")
    shutil.rmtree(trainer.tmp_path / "cut" / "checkpoints" / "step_0000003")
    monkeypatch.setattr("nemo_lmpo.training.reference.ReferenceLogps._compute", _must_not_run)
    resumed = trainer.train(override, *saving, run="cut")
    assert resumed[3]["loss"] == whole[3]["loss"]
    assert resumed[3]["rewards/chosen"] == whole[3]["rewards/chosen"] != 0.0


@pytest.mark.parametrize("kind", ["false", "true"])
def test_another_model_is_the_reference(trainer: Trainer, kind: str) -> None:
    """Rewards are beta times the distance from its log-probabilities, which a run from it says at its first step."""
    one_step = ("trainer.max_steps=1", "loss.beta=0.5", "model.architecture=null", "model.tokenizer=null")
    trainer.train("trainer.max_steps=2", "optim.lr=1e-2", run="first")
    first, second = (f"{trainer.tmp_path / name}" for name in ("first", "second"))
    trainer.train("trainer.max_steps=2", "optim.lr=1e-2", f"model.restore_from_path={first}", run="second")
    from_first = trainer.train(*one_step, f"model.restore_from_path={first}", run="a")[1]
    given = (f"model.restore_from_path={second}", f"model.reference_from_path={first}")
    found = trainer.train(*one_step, *given, f"model.reference_in_memory={kind}", run="b")[1]
    for side in ("chosen", "rejected"):
        distance = found[f"logps/{side}_sum"] - from_first[f"logps/{side}_sum"]
        assert abs(distance) > 0.1
        assert found[f"rewards/{side}"] == pytest.approx(0.5 * distance, abs=1e-4)


def _must_not_run(*arguments: Any) -> Never:
    raise AssertionError("the cache was not used")


def test_other_weights_or_data_or_precision_are_computed_anew(trainer: Trainer) -> None:
    step = "trainer.max_steps=1"
    trainer.train(step)
    before = trainer.entries()
    trainer.train(step, run="again")
    assert trainer.entries() == before
    trainer.train(step, "model.seed=7", run="weights")
    assert len(trainer.entries()) == len(before) + 2
    trainer.train(step, "data.train.limit=16", run="data")
    assert len(trainer.entries()) == len(before) + 3
    trainer.train(step, "trainer.precision=bf16", run="precision")
    assert len(trainer.entries()) == len(before) + 5


KEY = ReferenceKey("w", "d", "t", "32")


def test_entry_round_trip_and_damage(tmp_path: Path) -> None:
    values = np.array([[-1.5, -2.25, -1.0, -2.25], [-3.0, -0.125, -3.0, -0.125]])
    write_entry(tmp_path, KEY, values)
    np.testing.assert_array_equal(read_entry(tmp_path, KEY, 2), values)
    assert read_entry(tmp_path, KEY, 3) is None
    assert read_entry(tmp_path, dataclasses.replace(KEY, weights="other"), 2) is None
    content = bytearray((tmp_path / "logps.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "logps.npy").write_bytes(bytes(content))
    assert read_entry(tmp_path, KEY, 2) is None
    assert read_entry(tmp_path / "nothing", KEY, 2) is None


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    config = load_recipe("lmpo_tiny").model
    start = find_start_model(config)
    assert len({weights_fingerprint(start.path, start.architecture, seed) for seed in (1, 2)}) == 2
    places = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
        places.append(weights_fingerprint(tmp_path / name, start.architecture, 1))
    assert places[0] == places[1] != places[2]


def test_reference_in_memory_without_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name=lmpo compares with no reference model"):
        load_recipe("lmpo_tiny", ["model.reference_in_memory=true"])

"""The NeMo class, driven as NeMo-Aligner's own trainers drive a model: restored from a `.nemo`, stepped, saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_lmpo import training
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.nemo_plugin import MegatronGPTLMPOModel, config_from_nemo, nemo_config
from nemo_lmpo.training.process import distributed_session
from nemo_lmpo.training.session import open_session

SMALL = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=2",
    "model.global_batch_size=8",
    "data.train.limit=64",
    "data.validation.path=null",
    "trainer.max_steps=3",
    "trainer.num_threads=1",
    "checkpoint.save_interval=0",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
)


def train_as_nemo_aligner_does(model: Any) -> list[dict[str, float]]:
    """The calls of its DPO trainer, in its order; clipping is part of megatron-core's optimizer step."""
    model.setup_training_data(model.cfg.get("data"))
    optimizer, scheduler = model.setup_optimization()
    lines = []
    for batch in model.train_dataloader():
        model.prepare_for_training_step()
        loss, metrics = model.get_loss_and_metrics(batch, forward_only=False)
        model.finish_training_step()
        _, norm, _ = optimizer.step()
        scheduler.step(increment=1)
        assert loss == metrics["loss"]
        lines.append({**metrics, "grad_norm": norm})
    return lines


@pytest.mark.parametrize("recipe", ["lmpo_tiny", "dpo_tiny"])
def test_steps_equal_those_of_training(recipe: str, tmp_path: Path) -> None:
    start = tmp_path / "start.nemo"
    config = load_recipe(recipe, [*SMALL, f"run_dir={tmp_path / 'start'}"])
    with open_session(config, LaunchInfo()) as session:
        session.files.save_to(start)
    settings = [*SMALL, f"model.restore_from_path={start}", f"data.cache_dir={tmp_path / 'cache'}"]
    config = load_recipe(recipe, [*settings, f"run_dir={tmp_path / 'run'}"])
    training.run(config, LaunchInfo())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [line for line in lines if "loss" in line]
    end = tmp_path / "end.nemo"
    with distributed_session(config, LaunchInfo()):
        model = MegatronGPTLMPOModel.restore_from(start, nemo_config(config))
        found = train_as_nemo_aligner_does(model)
        model.save_to(end)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen_sum", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    trained = open_model(tmp_path / "run" / "checkpoints" / "step_0000003").source
    saved = open_model(end).source
    assert set(saved.names()) == set(trained.names())
    assert all(saved.get(name).allclose(trained.get(name), atol=1e-7) for name in saved.names())


def test_restores_without_a_configuration_into_one_process(tmp_path: Path) -> None:
    archive = tmp_path / "policy.nemo"
    with open_session(load_recipe("lmpo_tiny", [*SMALL, f"run_dir={tmp_path / 'run'}"]), LaunchInfo()) as session:
        session.files.save_to(archive)
    with distributed_session(load_recipe("lmpo_tiny", SMALL), LaunchInfo()):
        model = MegatronGPTLMPOModel.restore_from(archive)
        assert model.policy.architecture == open_model(archive).architecture
        with pytest.raises(ConfigError, match=r"trainer\.max_steps is not set"):
            model.setup_optimization()
        model.save_to(tmp_path / "again.nemo")
    first, again = open_model(archive).source, open_model(tmp_path / "again.nemo").source
    assert all(again.get(name).equal(first.get(name).to(again.get(name).dtype)) for name in first.names())


def test_configuration_goes_there_and_back_in_nemos_form(tmp_path: Path) -> None:
    config = load_recipe("lmpo_tiny", [*SMALL, "loss.lam=0.5"])
    cfg = nemo_config(config)
    assert cfg.tensor_model_parallel_size == 1
    assert cfg.loss.lam == 0.5
    assert config_from_nemo(cfg) == config
    path = tmp_path / "cfg.yaml"
    OmegaConf.save(cfg, path)
    restored = MegatronGPTLMPOModel.restore_from("policy.nemo", path, return_config=True)
    assert restored.restore_from_path == "policy.nemo"
    assert restored.loss.lam == 0.5
    cfg.tensor_model_paralel_size = 2
    with pytest.raises(ConfigError, match=r"did you mean model\.tensor_model_parallel_size"):
        config_from_nemo(cfg)


def test_adapters_are_saved_with_what_they_adapt(tmp_path: Path) -> None:
    """New adapters change nothing, so the archive holds the start weights."""
    plain, adapted = tmp_path / "plain.nemo", tmp_path / "adapted.nemo"
    for archive, settings in ((plain, ()), (adapted, ("model.peft.name=lora", "model.peft.rank=4"))):
        config = load_recipe("lmpo_tiny", [*SMALL, *settings])
        with distributed_session(config, LaunchInfo()):
            MegatronGPTLMPOModel(nemo_config(config)).save_to(archive)
    expected, found = open_model(plain).source, open_model(adapted).source
    assert all(found.get(name).allclose(expected.get(name), atol=1e-7) for name in expected.names())

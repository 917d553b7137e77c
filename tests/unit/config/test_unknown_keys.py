"""What users hear of a key that no setting has: the one that they meant, also under another trainer's name."""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from collections.abc import Iterator

import pytest

from nemo_lmpo.config.mode import MODE_WORDS
from nemo_lmpo.config.names_elsewhere import COUNTERPARTS, WITHOUT
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.schema import all_keys, all_settings
from nemo_lmpo.config.unknown_keys import about_unknown_key, options_of
from nemo_lmpo.errors import ConfigError, nearest
from nemo_lmpo.loss.options import OPTIONS

SETTINGS = {*all_keys(), "loss.name", *(f"loss.{option}" for loss in OPTIONS for option in options_of(loss))}
GROUPS = {key for key, _ in all_settings()} - SETTINGS


def classes() -> Iterator[type]:
    """The configurations that people come from, of the installed libraries."""
    for module, name in (
        ("transformers", "TrainingArguments"),
        ("trl", "DPOConfig"),
        ("trl", "ModelConfig"),
        ("trl", "ScriptArguments"),
        ("trl.experimental.cpo", "CPOConfig"),
        ("trl.experimental.orpo", "ORPOConfig"),
        ("trl.experimental.kto", "KTOConfig"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield getattr(importlib.import_module(module), name)
            except ImportError:  # where older versions have them
                yield getattr(importlib.import_module("trl"), name)


def test_every_field_of_other_trainers_is_answered() -> None:
    """A new field of a library appears here: give it its counterpart, or say why there is none."""
    pytest.importorskip("trl")
    fields = {field.name for cls in classes() for field in dataclasses.fields(cls)}
    assert len(fields) > 150
    own = {key.rpartition(".")[2] for key in SETTINGS | GROUPS}
    unanswered = sorted(fields - own - COUNTERPARTS.keys() - WITHOUT.keys())
    assert not unanswered
    for field in fields - {key for key in GROUPS if "." not in key}:
        said = about_unknown_key(field, 1, "dpo")
        assert "; known" not in said, said
        assert len(said) < 200, said


def test_what_is_suggested_exists() -> None:
    assert set(COUNTERPARTS.values()) <= SETTINGS
    for sentence in WITHOUT.values():
        for key in re.findall(
            r"\b(?:model|data|loss|optim|trainer|checkpoint|logging)\.[a-z_.]*[a-z]\b(?!\*)", sentence
        ):
            assert key in SETTINGS | GROUPS, sentence
    assert not COUNTERPARTS.keys() & WITHOUT.keys()
    assert not COUNTERPARTS.keys() & set(MODE_WORDS)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("beta", "loss.beta"),
        ("lam", "loss.lam"),
        ("lr", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("trainer.lr", "optim.lr"),
        ("model.optim.lr", "optim.lr"),
        ("model.optim.sched.min_lr", "optim.sched.min_lr"),
        ("max_length", "data.max_length"),
        ("max_prompt_length", "data.max_prompt_length"),
        ("num_train_epochs", "trainer.max_epochs"),
        ("trainer.dpo.max_epochs", "trainer.max_epochs"),
        ("model.dpo.ref_policy_kl_penalty", "loss.beta"),
        ("policy.megatron_cfg.tensor_model_parallel_size", "model.tensor_model_parallel_size"),
        ("exp_manager.explicit_log_dir", "run_dir"),
        ("exp_manager.wandb_logger_kwargs.project", "logging.wandb.project"),
        ("logging_steps", "logging.log_interval"),
        ("save_total_limit", "checkpoint.keep_last"),
        ("loss_type", "loss.name"),
        ("loss.type", "loss.name"),
        ("loss.lambda", "loss.lam"),
        ("loss.learning_rate", "optim.lr"),
        ("model.peft.r", "model.peft.rank"),
        ("model.tensor_model_paralel_size", "model.tensor_model_parallel_size"),
        ("modle.sede", "model.seed"),
        ("optim.warmup", "optim.sched.warmup_fraction"),
        ("trainer.max_stepz", "trainer.max_steps"),
        ("max_stepz", "trainer.max_steps"),
        ("data.train.pth", "data.train.path"),
        ("data.path", "data.train.path or data.validation.path"),
        ("dryrun", "dry_run"),
        ("policy.megatron_cfg.freeze_moe_router", "model.moe_freeze_router"),
        ("ep_size", "model.expert_model_parallel_size"),
    ],
)
def test_the_setting_that_was_meant(key: str, meant: str) -> None:
    assert f"; did you mean {meant}?" in about_unknown_key(key, 1, "lmpo")


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "policy.megatron_cfg.moe_router_load_balancing_type"])
def test_balancing_is_two_settings(key: str) -> None:
    """The weight alone, named as the counterpart, would balance nothing."""
    said = about_unknown_key(key, 1, "dpo")
    assert "set model.moe_aux_loss to global_batch or sequence" in said
    assert "model.moe_aux_loss_coefficient" in said


@pytest.mark.parametrize("key", ["trainer.bananas", "data.bananas", "bananas", "fruit.bananas", "loss.bananas", "x"])
def test_nothing_is_suggested_where_nothing_is_near(key: str) -> None:
    said = about_unknown_key(key, 1, "lmpo")
    assert "did you mean" not in said
    group = key.rpartition(".")[0]
    assert {"trainer": "known in trainer: max_epochs", "loss": "Options of lmpo:"}.get(group, "known") in said


@pytest.mark.parametrize("key", ["batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"])
def test_batch_sizes_are_told_what_counts_here(key: str) -> None:
    said = about_unknown_key(key, 8, "dpo")
    assert "model.global_batch_size counts the pairs of an optimizer step" in said
    assert "micro_batch_size" not in said.removeprefix(f"unknown key {key}")


def test_an_option_of_another_loss_is_named_with_it() -> None:
    assert "loss.ld_alpha is an option of dpo, and loss.name=lmpo" in about_unknown_key("ld_alpha", 0.5, "lmpo")
    assert "did you mean loss.gamma? It is an option of simpo" in about_unknown_key("simpo_gamma", 0.5, "lmpo")
    assert "did you mean loss.gamma?" in about_unknown_key("gamma", 0.5, "simpo")


def test_every_key_of_an_unknown_group_is_answered() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("lmpo_tiny", ["exp_manager.explicit_log_dir=x", "exp_manager.create_wandb_logger=true", "beta=2"])
    said = str(caught.value).splitlines()
    assert [line.split(";")[0] for line in said] == [
        "unknown key exp_manager.explicit_log_dir",
        "unknown key exp_manager.create_wandb_logger",
        "unknown key beta",
    ]


def test_the_nearest_name() -> None:
    assert nearest("lmpo_tinny", ["dpo_tiny", "lmpo_tiny"]) == "lmpo_tiny"
    assert nearest("bananas", ["num_nodes", "max_steps"]) is None
    assert nearest("", ["a"]) is None

"""Composition of recipes, and what users hear of a wrong key or value."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from pathlib import Path

import pytest

from nemo_lmpo.config import schema as config_module
from nemo_lmpo.config.recipe import all_keys, config_as_dict, config_from_mapping, load_recipe
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError

WRONG = {
    "misspelt": ("model.tensor_model_paralel_size=2", ("model.tensor_model_parallel_size",)),
    "nested": ("optim.sched.warmup=0.1", ("optim.sched.warmup", "optim.sched.warmup_fraction")),
    "wrong_group": ("trainer.lr=1e-3", ("trainer.lr", "optim.lr")),
    "no_group": ("max_steps=3", ("max_steps", "trainer.max_steps")),
    "deep": ("data.train.pth=x", ("data.train.pth", "data.train.path")),
    "loss_option": ("loss.beeta=2", ("loss.beeta", "beta")),
    "loss_name": ("loss.name=lmp", ("loss.name='lmp'", "lmpo")),
    "text_for_number": ("optim.lr=fast", ("optim.lr='fast'", "a number")),
    "fraction_for_whole": ("trainer.max_steps=1.5", ("trainer.max_steps=1.5", "a whole number")),
    "text_for_switch": ("model.sequence_parallel=maybe", ("model.sequence_parallel='maybe'", "true or false")),
    "number_for_switch": ("checkpoint.resume=1", ("checkpoint.resume=1", "true or false")),
    "switch_for_number": ("optim.lr=true", ("optim.lr=True", "a number")),
    "number_for_list": ("optim.betas=0.9", ("optim.betas=0.9", "a list")),
    "texts_in_list": ("optim.betas=[a,b]", ("optim.betas=['a', 'b']", "a list")),
    "number_for_group": ("optim.sched=3", ("optim.sched=3", "group of settings", "warmup_fraction")),
    "nothing": ("optim.lr=null", ("optim.lr", "must not be empty", "a number")),
    "unreadable": ("model.seed", ("model.seed",)),
    "unclosed": ("optim.betas=[0.9", ("optim.betas",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_overrides(case: str) -> None:
    override, expected = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        load_recipe("lmpo_tiny", [override])
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="--config-name lmpo_tinny is no recipe; did you mean lmpo_tiny"):
        load_recipe("lmpo_tinny")


def test_name_with_ending() -> None:
    assert load_recipe("lmpo_tiny.yaml").name == "lmpo_tiny"


def test_values_take_their_types() -> None:
    config = load_recipe(
        "lmpo_tiny",
        [
            "optim.lr=1e-5",
            "trainer.max_steps=20.0",
            "trainer.precision=32",
            "trainer.max_time_per_run='00:10:00'",
            "model.micro_batch_size=null",
            "optim.betas=[0,0.5]",
            "loss.lam=1",
        ],
    )
    assert config.optim.lr == 1e-5
    assert config.trainer.max_steps == 20
    assert isinstance(config.trainer.max_steps, int)
    assert config.trainer.precision == "32"
    assert config.trainer.max_time_per_run == "00:10:00"
    assert config.optim.betas == [0.0, 0.5]
    assert config.loss.lam == 1.0


def test_own_recipes_extend_the_packages(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [lmpo_tiny, _self_]\nname: mine\noptim: {lr: 3.0e-4}\n")
    config = load_recipe("mine", ["trainer.max_steps=7"], config_dir=tmp_path)
    base = load_recipe("lmpo_tiny")
    assert (config.name, config.optim.lr, config.trainer.max_steps) == ("mine", 3e-4, 7)
    assert config.model == base.model
    assert load_recipe("lmpo_tiny", config_dir=tmp_path) == base, "the package's recipes stay within reach"


def test_own_recipe_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "alone.yaml").write_text("trainer: {max_steps: 2}\n")
    config = load_recipe("alone", config_dir=tmp_path)
    assert config.name == "alone"
    assert config == dataclasses.replace(Config(), name="alone", loss=config.loss, trainer=config.trainer)


def test_broken_own_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("trainer: {max_steps: 2\n")
    with pytest.raises(ConfigError, match="broken"):
        load_recipe("broken", config_dir=tmp_path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just odd text\n"])
def test_a_recipe_without_settings_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match="odd"):
        load_recipe("odd", config_dir=tmp_path)


def test_own_groups_are_found_for_the_packages_recipes(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mild.yaml").write_text("name: simpo\nbeta: 0.5\n")
    assert load_recipe("lmpo_tiny", ["loss=mild"], config_dir=tmp_path).loss.beta == 0.5
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "short.yaml").write_text("max_steps: 3\n")
    assert load_recipe("lmpo_tiny", ["+trainer=short"], config_dir=tmp_path).trainer.max_steps == 3


def test_config_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir .*nowhere is not a directory; give the folder"):
        load_recipe("lmpo_tiny", config_dir=tmp_path / "nowhere")


def test_another_loss_leaves_the_recipes_options_behind() -> None:
    assert load_recipe("lmpo_tiny", ["loss=simpo"]).loss.name == "simpo"
    assert load_recipe("lmpo_tiny", ["loss.name=dpo", "loss.beta=0.3"]).loss.beta == 0.3
    assert load_recipe("lmpo_tiny", ["loss.lam=1.0"]).loss.beta == load_recipe("lmpo_tiny").loss.beta


def test_what_is_saved_reads_back_the_same() -> None:
    config = load_recipe("lmpo_tiny", ["loss.lam=0.7", "model.micro_batch_size=3", "optim.betas=[0.8,0.95]"])
    assert config_from_mapping(config_as_dict(config)) == config


def test_every_option_is_documented_or_plain() -> None:
    """A field's type must be one that values can be checked against."""
    for cls in (value for value in vars(config_module).values() if dataclasses.is_dataclass(value)):
        for name, hint in typing.get_type_hints(cls).items():
            options = typing.get_args(hint) or (hint,)
            kinds = itertools.chain(*(typing.get_args(option) or (option,) for option in options))
            assert all(
                kind in (str, int, float, bool, type(None), typing.Any) or dataclasses.is_dataclass(kind)
                for kind in kinds
            ), f"{cls.__name__}.{name}"


def test_keys_of_every_group_are_listed() -> None:
    keys = set(all_keys())
    assert {"run_dir", "model.seed", "data.train.path", "optim.sched.min_lr", "logging.wandb.project"} <= keys

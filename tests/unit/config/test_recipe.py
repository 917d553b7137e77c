"""Composition of recipes, and what users hear of a wrong key or value."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_lmpo.config import schema
from nemo_lmpo.config.coerce import alternatives, types_of
from nemo_lmpo.config.recipe import config_as_dict, config_from_mapping, load_recipe, recipes_dir
from nemo_lmpo.config.schema import Config, all_keys
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.registry import LOSSES
from nemo_lmpo.slurm.submit import Submission, sbatch_command
from nemo_lmpo.train import main

WRONG = {
    "misspelt": ("model.tensor_model_paralel_size=2", ("model.tensor_model_parallel_size",)),
    "nested": ("optim.sched.warmup=0.1", ("optim.sched.warmup", "optim.sched.warmup_fraction")),
    "wrong_group": ("trainer.lr=1e-3", ("trainer.lr", "optim.lr")),
    "no_group": ("max_steps=3", ("max_steps", "trainer.max_steps")),
    "deep": ("data.train.pth=x", ("data.train.pth", "data.train.path")),
    "loss_option": ("loss.beeta=2", ("unknown key loss.beeta", "did you mean loss.beta?")),
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
    **{
        f"{name}_unknown": (f"{name}=odd", (f"{name}='odd'", "choose", known))
        for name, known in (
            ("trainer.precision", "bf16"),
            ("data.on_bad_row", "skip"),
            ("data.train.schema", "messages"),
            ("checkpoint.mode", "max"),
            ("optim.sched.name", "constant"),
            ("model.attention_backend", "sdpa"),
            ("model.activations_checkpoint_granularity", "selective"),
            ("model.activations_checkpoint_method", "block"),
        )
    },
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
    with pytest.raises(ConfigError, match="lmpo_tinny is not a recipe; did you mean lmpo_tiny"):
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


def test_one_text_is_a_list_of_one() -> None:
    """PEFT's spelling is `target_modules: all-linear`."""
    overrides = ["model.peft.target_modules=all-linear", "checkpoint.allow_changes=optim.lr"]
    config = load_recipe("lmpo_tiny", overrides)
    assert config.model.peft.target_modules == ["all-linear"]
    assert config.checkpoint.allow_changes == ["optim.lr"]
    with pytest.raises(ConfigError, match=r"target_modules names '\.\*_proj', which no layer has"):
        load_recipe("lmpo_tiny", ["model.peft.target_modules='.*_proj'"])


def test_own_recipes_extend_the_packages(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [lmpo_tiny, _self_]\nname: mine\noptim: {lr: 3.0e-4}\n")
    config = load_recipe("mine", ["trainer.max_steps=7"], config_dir=tmp_path)
    base = load_recipe("lmpo_tiny")
    assert (config.name, config.optim.lr, config.trainer.max_steps) == ("mine", 3e-4, 7)
    assert config.model == base.model
    assert load_recipe("lmpo_tiny", config_dir=tmp_path) == base, "the package's recipes stay within reach"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `own` with recipes, one of which extends another, seen from the working directory."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "base.yaml").write_text("defaults: [lmpo_tiny, _self_]\noptim: {lr: 3.0e-4}\n")
    (own / "mine.yaml").write_text("defaults: [base, _self_]\nname: called\ntrainer: {max_steps: 7}\n")
    monkeypatch.chdir(tmp_path)
    return own


@pytest.mark.parametrize("written", ["own/mine.yaml", "./own/mine.yaml", "{own}/mine.yaml", "~/mine.yaml"])
def test_a_recipe_may_be_a_path(written: str, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(mine))
    config = load_recipe(written.format(own=mine), ["loss=simpo"])
    assert (config.name, config.loss.name, config.optim.lr, config.trainer.max_steps) == ("called", "simpo", 3e-4, 7)


def test_a_file_in_the_working_directory_is_a_path(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine)
    assert load_recipe("mine.yaml").trainer.max_steps == 7
    (mine / "other").mkdir()
    (mine / "other" / "mine.yaml").write_text("trainer: {max_steps: 3}\n")
    assert load_recipe("mine.yaml", config_dir=mine / "other").trainer.max_steps == 3, "--config-dir comes first"
    assert load_recipe("./mine.yaml", config_dir=mine / "other").trainer.max_steps == 7
    with pytest.raises(ConfigError, match="mine is not a recipe"):
        load_recipe("mine")


def test_a_path_goes_with_a_folder_of_recipes(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "parts" / "loss").mkdir(parents=True)
    (tmp_path / "parts" / "loss" / "mild.yaml").write_text("name: simpo\nbeta: 0.5\n")
    config = load_recipe("own/mine.yaml", ["loss=mild"], config_dir=tmp_path / "parts")
    assert (config.name, config.loss.beta) == ("called", 0.5)


def test_the_packages_recipes_may_be_paths() -> None:
    assert load_recipe(str(recipes_dir() / "lmpo_tiny.yaml")) == load_recipe("lmpo_tiny")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("own/nowhere.yaml", "--config own/nowhere.yaml does not exist; give the file"),
        ("own", "own is not a recipe"),
        ("own/", "--config own/ is a directory; give a recipe's file in it, or --config-dir"),
        ("own/old.yml", "--config own/old.yml must end in .yaml; rename it"),
        ("own/notes.txt", "--config own/notes.txt must end in .yaml; rename it"),
    ],
)
def test_paths_that_are_not_recipes(written: str, said: str, mine: Path) -> None:
    for name in ("old.yml", "notes.txt"):
        (mine / name).write_text("name: x\n")
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_recipe(written)


@pytest.mark.parametrize("option", [["--config"], ["--config-name"], []])
def test_the_command_takes_a_path(option: list[str], mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*option, "own/mine.yaml", "--show-config"]) == 0
    assert "name: called" in capsys.readouterr().out


def test_a_job_is_given_the_whole_path(mine: Path) -> None:
    command = sbatch_command(Submission("own/mine.yaml"), Path("slurm"), {})
    assert str(mine / "mine.yaml") in command
    assert "--job-name=mine" in command


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


def plain_types(hint: object) -> Iterator[object]:
    for option in alternatives(hint):
        if typing.get_origin(option) is typing.Literal:
            yield from map(type, typing.get_args(option))
        elif typing.get_origin(option) in (list, dict):
            yield from (part for argument in typing.get_args(option) for part in plain_types(argument))
        else:
            yield option


def test_every_setting_has_a_type_that_values_are_checked_against() -> None:
    groups: set[typing.Any] = {value for value in vars(schema).values() if dataclasses.is_dataclass(value)}
    for cls in [*groups, *(entry.config for entry in LOSSES.values())]:
        for name, hint in types_of(cls).items():
            for kind in plain_types(hint):
                fits = kind in (str, int, float, bool, type(None), typing.Any) or dataclasses.is_dataclass(kind)
                assert fits, f"{cls.__name__}.{name}"


def test_one_coercer_answers_alike() -> None:
    """Words for switches, numbers as text: the same for settings and for options of losses."""
    for word, meant in (("yes", True), ("Off", False), ("true", True)):
        two = "model.tensor_model_parallel_size=2"
        config = load_recipe("lmpo_tiny", [f"loss.z_score={word}", f"model.sequence_parallel={word}", two])
        assert (config.loss.z_score, config.model.sequence_parallel) == (meant, meant)
    for key in ("loss.z_score", "model.sequence_parallel"):
        with pytest.raises(ConfigError, match=rf"{key}=1 is not true or false"):
            load_recipe("lmpo_tiny", [f"{key}=1"])
    for key in ("loss.beta", "optim.lr"):
        assert load_recipe("lmpo_tiny", [f"{key}='1e-3'"])
        with pytest.raises(ConfigError, match=rf"{key}='fast' is not a number"):
            load_recipe("lmpo_tiny", [f"{key}=fast"])


def test_all_wrong_keys_and_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("lmpo_tiny", ["optim.lr=fast", "model.sede=3", "trainer.precision=16"])
    assert len(str(caught.value).splitlines()) == 3


def test_the_sentence_about_an_unknown_key() -> None:
    expected = "unknown key model.tensor_model_parallel_sise; did you mean model.tensor_model_parallel_size?"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load_recipe("lmpo_tiny", ["model.tensor_model_parallel_sise=2"])


def test_keys_of_every_group_are_listed() -> None:
    keys = set(all_keys())
    assert {"run_dir", "model.seed", "data.train.path", "optim.sched.min_lr", "logging.wandb.project"} <= keys

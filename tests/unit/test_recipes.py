"""Every recipe composes, has known keys only, and is valid for the processes that it is laid out for."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.checkpoint.same_run import flatten
from nemo_lmpo.config.recipe import compose, config_as_dict, load_recipe, recipe_names, recipes_dir
from nemo_lmpo.config.rules import validate
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.registry import LOSSES
from nemo_lmpo.training.start_model import find_start_model
from tests.unit.composed import recipe

SETTINGS = ("mistral_7b_base", "mistral_7b_instruct", "llama3_8b_base", "llama3_8b")
METHODS = ("sft", "dpo", "slic", "ipo", "cpo", "kto", "simpo", "lmpo")
# A hub model whose recipe does not state the architecture: public facts.
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize("name", recipe_names())
def test_is_valid_for_its_own_world_size(name: str) -> None:
    config = copy.deepcopy(recipe(name))
    if config.model.architecture is None:
        config.model.architecture = SMOLLM2
    start = find_start_model(config.model, fetch=False)
    layout = validate(config, start.architecture, config.trainer.devices * config.trainer.num_nodes)
    assert layout.data_parallel_size >= 1
    assert config.name == ("lmpo_tiny" if name == "train" else name)


def test_every_group_file_is_used_or_can_be_chosen() -> None:
    for path in recipes_dir().rglob("*.yaml"):
        group = path.relative_to(recipes_dir()).parent.as_posix()
        assert group in (".", "setting", "model", "data", "loss", "optim", "trainer", "specialization", "compat"), path
        if group == "loss":
            assert load_recipe("lmpo_tiny", [f"loss={path.stem}"]).loss.name in LOSSES
        if group == "specialization":
            assert path.stem in recipe_names(), f"{path} belongs to no loss on no setting"


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_released_code_keeps_what_the_setting_has(setting: str) -> None:
    paper, released = recipe(f"lmpo_{setting}"), load_recipe(f"lmpo_{setting}", ["compat=released_code"])
    assert released.loss == dataclasses.replace(paper.loss, compat="released_code")
    assert released.data == dataclasses.replace(paper.data, compat="released_code")
    assert released.optim == paper.optim
    assert load_recipe("train", [f"setting={setting}", "compat=released_code"]).loss == released.loss


def test_the_released_code_is_lmpo_only() -> None:
    with pytest.raises(ConfigError, match=r"loss\.compat='released_code': loss\.name=simpo does not use it"):
        load_recipe("simpo_tiny", ["compat=released_code"])


def test_a_dozen_files_at_the_top() -> None:
    assert len(list(recipes_dir().glob("*.yaml"))) <= 12


def test_every_loss_on_every_setting_is_a_recipe() -> None:
    settings = (*SETTINGS, "smollm2_135m", "tiny")
    assert {*METHODS, "orpo"} <= set(LOSSES)
    assert {f"{loss}_{setting}" for loss in LOSSES for setting in settings} <= set(recipe_names())


# The paper's Table 5 and Appendix D; gamma from SimPO's README.
PUBLISHED = {
    "mistral_7b_base": (2.0, 1.6, 1.0, 3e-7, 1024, 512, 1.6),
    "mistral_7b_instruct": (2.5, 0.25, 0.2, 5e-7, 2048, 1800, 0.25),
    "llama3_8b_base": (2.0, 1.0, 0.2, 6e-7, 2048, 1800, 1.0),
    "llama3_8b": (2.5, 1.4, 0.2, 1e-6, 2048, 1800, 1.375),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_published_values(setting: str) -> None:
    beta, log_h, lam, lr, max_length, max_prompt_length, gamma = PUBLISHED[setting]
    lmpo, simpo = recipe(f"lmpo_{setting}"), recipe(f"simpo_{setting}")
    assert (lmpo.loss.beta, lmpo.loss.log_h, lmpo.loss.lam) == (beta, log_h, lam)
    assert (simpo.loss.beta, simpo.loss.gamma) == (beta, gamma)
    for config in (lmpo, simpo):
        assert config.optim.lr == lr
        assert (config.data.max_length, config.data.max_prompt_length) == (max_length, max_prompt_length)
        assert (config.model.global_batch_size, config.trainer.max_epochs, config.model.seed) == (128, 1, 42)
        assert (config.trainer.precision, config.trainer.val_check_interval) == ("bf16", 400)
        assert (config.optim.sched.name, config.optim.sched.warmup_fraction) == ("cosine", 0.1)


@pytest.mark.parametrize(
    ("setting", "start", "template"),
    [
        ("mistral_7b", "mistralai/Mistral-7B-v0.1", "zephyr"),
        ("llama3_8b", "meta-llama/Meta-Llama-3-8B", "llama3"),
    ],
)
def test_published_values_of_sft(setting: str, start: str, template: str) -> None:
    """alignment-handbook's zephyr-7b-beta and SimPO's llama-3-8b-base-sft; the Base settings go on from the result."""
    config = recipe(f"sft_{setting}_ultrachat")
    assert (config.model.restore_from_path, config.data.chat_template) == (start, template)
    assert (config.data.train.path, config.data.train.split) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert (config.data.validation.path, config.data.validation.split) == (config.data.train.path, "test_sft")
    assert (config.optim.lr, config.data.max_length, config.model.global_batch_size) == (2e-5, 2048, 128)
    assert (config.optim.sched.name, config.optim.sched.warmup_fraction) == ("cosine", 0.1)
    assert (config.trainer.max_epochs, config.trainer.precision, config.model.seed) == (1, "bf16", 42)
    base = recipe(f"lmpo_{setting}_base")
    assert base.model.architecture == config.model.architecture
    assert f"lmpo_{setting}_ultrachat" not in recipe_names()  # it has no pairs


def test_published_values_on_pairs_ranked_by_armorm() -> None:
    """SimPO's llama-3-8b-instruct-simpo-v2; LMPO's are untuned."""
    simpo, lmpo = recipe("simpo_llama3_8b_v2"), recipe("lmpo_llama3_8b_v2")
    assert simpo.data.train.path == lmpo.data.train.path == "princeton-nlp/llama3-ultrafeedback-armorm"
    assert (simpo.loss.beta, simpo.loss.gamma, simpo.optim.lr) == (10.0, 3.0, 1e-6)
    assert (lmpo.loss, lmpo.optim, lmpo.model) == tuple(
        getattr(recipe("lmpo_llama3_8b"), name) for name in ("loss", "optim", "model")
    )


# As their model cards give them.
QWEN_PARAMETERS = {"qwen3_8b": 8_190_735_360, "qwen2_5_7b": 7_615_616_512}


@pytest.mark.parametrize("setting", QWEN_PARAMETERS)
def test_untuned_settings_are_llama3_instructs(setting: str) -> None:
    def rest(name: str) -> dict[str, Any]:
        values = dict(flatten(config_as_dict(recipe(name))))
        its_own = ("name", "run_dir", "model.restore_from_path", "model.architecture.", "data.chat_template")
        return {key: value for key, value in values.items() if not key.startswith(its_own)}

    assert rest(f"lmpo_{setting}") == rest("lmpo_llama3_8b")
    architecture = find_start_model(recipe(f"lmpo_{setting}").model, fetch=False).architecture
    assert architecture.num_parameters() == QWEN_PARAMETERS[setting]


@pytest.mark.parametrize("setting", SETTINGS)
def test_methods_of_a_setting_differ_in_loss_and_rate_only(setting: str) -> None:
    def rest(name: str) -> dict[str, Any]:
        values = dataclasses.asdict(recipe(name))
        values["optim"].pop("lr")
        return {key: value for key, value in values.items() if key not in ("loss", "name")}

    reference = rest(f"lmpo_{setting}")
    assert all(rest(f"{method}_{setting}") == reference for method in METHODS)


@pytest.mark.parametrize("override", ["loss=simpo", "loss.name=simpo", "+loss=simpo"])
@pytest.mark.parametrize("setting", ["tiny", "llama3_8b", "smollm2_135m"])
def test_another_loss_by_one_line(setting: str, override: str) -> None:
    """The recipe's own loss leaves nothing behind; what is particular to the new one on the setting comes."""
    config = load_recipe(f"lmpo_{setting}", [override])
    assert config == dataclasses.replace(recipe(f"simpo_{setting}"), name=f"lmpo_{setting}")


def test_any_loss_on_any_setting_by_the_general_recipe() -> None:
    assert load_recipe("train", ["loss=dpo", "setting=llama3_8b"]) == recipe("dpo_llama3_8b")


def test_options_given_with_another_loss_count() -> None:
    loss = load_recipe("lmpo_tiny", ["loss.name=simpo", "loss.gamma=1.6", "loss.beta=3"]).loss
    assert (loss.beta, loss.gamma) == (3.0, 1.6)
    assert load_recipe("lmpo_tiny", ["loss=dpo", "loss.beta=0.05"]).loss.beta == 0.05


def test_naming_the_same_loss_keeps_its_options() -> None:
    assert load_recipe("lmpo_mistral_7b_base", ["loss.name=lmpo", "loss.lam=0.05"]).loss.log_h == 1.6


def test_own_recipe_extends_a_loss_on_a_setting_that_has_no_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [dpo_tiny, _self_]\noptim: {lr: 5.0e-4}\n")
    config, base = load_recipe("mine", config_dir=tmp_path), recipe("dpo_tiny")
    assert (config.optim.lr, config.loss, config.model) == (5e-4, base.loss, base.model)
    assert load_recipe("mine", ["loss=kto"], config_dir=tmp_path).loss == recipe("kto_tiny").loss


def test_own_file_of_a_name_that_is_a_loss_on_a_setting_comes_first(tmp_path: Path) -> None:
    assert load_recipe("ipo_tiny").optim.lr == 1e-3
    (tmp_path / "ipo_tiny.yaml").write_text("defaults: [{setting: tiny}, {loss: ipo}, _self_]\noptim: {lr: 5.0e-4}\n")
    assert load_recipe("ipo_tiny", config_dir=tmp_path).optim.lr == 5e-4
    assert load_recipe("ipo_tiny").optim.lr == 1e-3


def test_other_files_beside_own_recipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [dpo_tiny, _self_]\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.yaml").write_bytes(b"\xff")
    assert load_recipe("mine", config_dir=tmp_path).loss == recipe("dpo_tiny").loss


def test_own_settings_and_losses_join_the_product(tmp_path: Path) -> None:
    for group, name, text in (
        ("setting", "small", "# @package _global_\ndefaults: [tiny, _self_]\noptim: {lr: 2.0e-3}\n"),
        ("loss", "bold", "name: simpo\ngamma: 3.0\n"),
        ("specialization", "bold_small", "# @package _global_\nloss: {beta: 0.5}\n"),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)
    assert {"bold_small", "bold_tiny", "dpo_small"} <= set(recipe_names(tmp_path))
    config = load_recipe("bold_small", config_dir=tmp_path)
    assert (config.loss.gamma, config.loss.beta, config.optim.lr) == (3.0, 0.5, 2e-3)
    assert load_recipe("dpo_small", config_dir=tmp_path).loss == load_recipe("dpo_tiny", ["loss.beta=0.01"]).loss


def test_a_loss_for_an_own_recipe_that_names_none(tmp_path: Path) -> None:
    (tmp_path / "alone.yaml").write_text("trainer: {max_steps: 2}\n")
    for override in ("loss=dpo", "loss.name=dpo"):
        assert load_recipe("alone", [override], config_dir=tmp_path).loss.name == "dpo"


def test_unknown_loss_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"loss=simpoo is not a file of the group loss; did you mean simpo\?"):
        compose("lmpo_tiny", ["loss=simpoo"])
    with pytest.raises(ConfigError, match=r"setting=llama_8b is not a file of the group.*mean llama3_8b\?"):
        compose("lmpo_tiny", ["setting=llama_8b"])


def test_own_recipe_extends_the_packages(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [lmpo_tiny, _self_]\noptim: {lr: 5.0e-4}\n")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "bold.yaml").write_text("name: simpo\ngamma: 3.0\n")
    config = load_recipe("mine", ["loss=bold"], config_dir=tmp_path)
    assert (config.optim.lr, config.loss.gamma, config.model.tokenizer) == (5e-4, 3.0, "builtin:tiny")


def test_group_of_another_setting() -> None:
    config = load_recipe("lmpo_tiny", ["setting=llama3_8b_base"])
    assert config.model.restore_from_path == "princeton-nlp/Llama-3-Base-8B-SFT"


def test_expected_architecture_is_compared(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_lmpo.config.schema import ModelConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    expected = {**SMOLLM2, "vocab_size": 64}
    with pytest.raises(ConfigError, match=r"hidden_size 32 instead of 576.*model\.architecture=null"):
        find_start_model(ModelConfig(restore_from_path=str(tmp_path), architecture=expected))
    assert find_start_model(ModelConfig(restore_from_path=str(tmp_path))).architecture.hidden_size == 32

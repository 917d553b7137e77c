"""Every recipe composes, has known keys only, and is valid for the processes that it is laid out for."""

import dataclasses

import pytest

from nemo_lmpo.config.recipe import compose, load_recipe, recipe_names, recipes_dir
from nemo_lmpo.config.rules import validate
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.base_model import find_base_model
from nemo_lmpo.loss.registry import LOSSES

SETTINGS = ("mistral_7b_base", "mistral_7b_instruct", "llama3_8b_base", "llama3_8b")
METHODS = ("sft", "dpo", "slic", "ipo", "cpo", "kto", "simpo", "lmpo")
# Hub models whose recipe does not state the architecture: public facts.
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


@pytest.mark.parametrize("name", recipe_names(recipes_dir()))
def test_is_valid_for_its_own_world_size(name):
    config = load_recipe(name)
    if config.model.architecture is None:
        config.model.architecture = SMOLLM2
    start = find_base_model(config.model, fetch=False)
    layout = validate(config, start.architecture, config.trainer.devices * config.trainer.num_nodes)
    assert layout.data_parallel_size >= 1
    assert config.name == name


def test_every_group_file_is_used_or_can_be_chosen():
    for path in recipes_dir().rglob("*.yaml"):
        group = path.relative_to(recipes_dir()).parent.as_posix()
        assert group in (".", "setting", "model", "data", "loss", "optim", "trainer"), path
        if group == "loss":
            assert load_recipe("lmpo_tiny", [f"loss={path.stem}"]).loss.name in LOSSES


def test_all_settings_and_methods_of_the_paper_are_there():
    assert {f"{method}_{setting}" for method in METHODS for setting in SETTINGS} <= set(recipe_names(recipes_dir()))
    assert {f"{method}_tiny" for method in LOSSES} <= set(recipe_names(recipes_dir()))
    assert {f"{method}_smollm2_135m" for method in METHODS} <= set(recipe_names(recipes_dir()))


# The paper's Table 5 and Appendix D; gamma from SimPO's README.
PUBLISHED = {
    "mistral_7b_base": (2.0, 1.6, 1.0, 3e-7, 1024, 512, 1.6),
    "mistral_7b_instruct": (2.5, 0.25, 0.2, 5e-7, 2048, 1800, 0.25),
    "llama3_8b_base": (2.0, 1.0, 0.2, 6e-7, 2048, 1800, 1.0),
    "llama3_8b": (2.5, 1.4, 0.2, 1e-6, 2048, 1800, 1.375),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_published_values(setting):
    beta, log_h, lam, lr, max_length, max_prompt_length, gamma = PUBLISHED[setting]
    lmpo, simpo = load_recipe(f"lmpo_{setting}"), load_recipe(f"simpo_{setting}")
    assert (lmpo.loss.beta, lmpo.loss.log_h, lmpo.loss.lam) == (beta, log_h, lam)
    assert (simpo.loss.beta, simpo.loss.gamma) == (beta, gamma)
    for config in (lmpo, simpo):
        assert config.optim.lr == lr
        assert (config.data.max_length, config.data.max_prompt_length) == (max_length, max_prompt_length)
        assert (config.model.global_batch_size, config.trainer.max_epochs, config.model.seed) == (128, 1, 42)
        assert (config.trainer.precision, config.trainer.val_check_interval) == ("bf16", 400)
        assert (config.optim.sched.name, config.optim.sched.warmup_fraction) == ("cosine", 0.1)


@pytest.mark.parametrize("setting", SETTINGS)
def test_methods_of_a_setting_differ_in_loss_and_rate_only(setting):
    def rest(name):
        values = dataclasses.asdict(load_recipe(name))
        values["optim"].pop("lr")
        return {key: value for key, value in values.items() if key not in ("loss", "name")}

    reference = rest(f"lmpo_{setting}")
    assert all(rest(f"{method}_{setting}") == reference for method in METHODS)


@pytest.mark.parametrize("override", ["loss=simpo", "loss.name=simpo", "+loss=simpo"])
@pytest.mark.parametrize("recipe", ["lmpo_tiny", "lmpo_llama3_8b", "lmpo_smollm2_135m"])
def test_another_loss_by_one_line(recipe, override):
    loss = load_recipe(recipe, [override]).loss
    assert (loss.name, loss.beta, loss.gamma) == ("simpo", 2.5, 1.375)  # SimPO's own defaults, not LMPO's values


def test_options_given_with_another_loss_count():
    loss = load_recipe("lmpo_tiny", ["loss.name=simpo", "loss.gamma=1.6", "loss.beta=3"]).loss
    assert (loss.beta, loss.gamma) == (3.0, 1.6)
    assert load_recipe("lmpo_tiny", ["loss=dpo", "loss.beta=0.05"]).loss.beta == 0.05


def test_naming_the_same_loss_keeps_its_options():
    assert load_recipe("lmpo_mistral_7b_base", ["loss.name=lmpo", "loss.lam=0.05"]).loss.log_h == 1.6


def test_unknown_loss_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"loss=simpoo is no file of the group loss; did you mean simpo\?"):
        compose("lmpo_tiny", ["loss=simpoo"], config_dir=None)


def test_own_recipe_extends_the_packages(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [lmpo_tiny, _self_]\noptim: {lr: 5.0e-4}\n")
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "bold.yaml").write_text("name: simpo\ngamma: 3.0\n")
    config = load_recipe("mine", ["loss=bold"], config_dir=tmp_path)
    assert (config.optim.lr, config.loss.gamma, config.model.tokenizer) == (5e-4, 3.0, "builtin:tiny")


def test_group_of_another_setting():
    config = load_recipe("lmpo_tiny", ["setting=llama3_8b_base"])
    assert config.model.restore_from_path == "princeton-nlp/Llama-3-Base-8B-SFT"


def test_expected_architecture_is_compared(tmp_path):
    from nemo_lmpo.config.schema import ModelConfig

    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, '
        '"num_hidden_layers": 2, "num_attention_heads": 4}'
    )
    expected = {**SMOLLM2, "vocab_size": 64}
    with pytest.raises(ConfigError, match=r"hidden_size 32 instead of 576.*model\.architecture=null"):
        find_base_model(ModelConfig(restore_from_path=str(tmp_path), architecture=expected))
    assert find_base_model(ModelConfig(restore_from_path=str(tmp_path))).architecture.hidden_size == 32

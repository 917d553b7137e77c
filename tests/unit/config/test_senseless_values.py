"""Every field of the configuration and of the losses meets values that make no sense: one sentence each."""

from __future__ import annotations

import pytest

from nemo_lmpo.config.recipe import compose, config_from_mapping
from nemo_lmpo.config.rules import validate
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.formats.architecture import architecture_from_hf
from tests.unit.config.senseless import VALUES, all_fields, makes_no_sense, with_value

LONGEST_LINE = 600
SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def recipes() -> dict[str, dict[str, object]]:
    """Plain settings of `lmpo_tiny` for every loss."""
    raw = compose("lmpo_tiny")
    return {loss: {**raw, "loss": {"name": loss}} for loss, _, _ in all_fields()}


def problem(raw: dict[str, object]) -> str | None:
    """What is said of settings; None: they are accepted."""
    try:
        validate(config_from_mapping(raw), architecture_from_hf(SHAPE), 1)
    except UserError as error:
        return str(error)
    return None


def test_all_of_them_are_refused_in_a_sentence(recipes: dict[str, dict[str, object]]) -> None:
    """Whether a value makes sense is told from the field's type, not from its limits: a new field needs some."""
    findings, tried = [], 0
    for loss, key, annotation in all_fields():
        for value in VALUES:
            if key == "loss.name" and value is None:
                continue  # the default loss
            tried += 1
            said = problem(with_value(recipes[loss], key, value))
            if said is None and makes_no_sense(key, annotation, value):
                findings.append(f"{loss} {key}={value!r} is accepted")
            for line in (said or "").splitlines():
                if not line.isprintable() or len(line) > LONGEST_LINE or line.startswith("error: forged"):
                    findings.append(f"{loss} {key}={value!r:.80} is refused with {line[:100]!r} ...")
            if said is not None and key.rpartition(".")[2] not in said:
                findings.append(f"{loss} {key}={value!r:.80} is refused without its name: {said}")
    assert tried > 2000
    assert not findings, f"{len(findings)} of {tried}\n" + "\n".join(findings[:40])


def test_the_recipe_itself_is_valid(recipes: dict[str, dict[str, object]]) -> None:
    assert [problem(raw) for raw in recipes.values()] == [None] * len(recipes)


def test_unknown_keys_are_refused_everywhere(recipes: dict[str, dict[str, object]]) -> None:
    groups = {key.rpartition(".")[0] for _, key, _ in all_fields()}
    for group in sorted(groups):
        with pytest.raises(ConfigError, match=r"unknown key .*odd_key"):
            config_from_mapping(with_value(recipes["lmpo"], f"{group}.odd_key".lstrip("."), 1))

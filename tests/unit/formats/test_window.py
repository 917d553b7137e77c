"""A window survives every description of an architecture that this project writes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from nemo_lmpo.formats.architecture import Architecture, architecture_from_hf, architecture_to_hf
from nemo_lmpo.formats.families import FAMILIES
from nemo_lmpo.formats.nemo import architecture_from_nemo, nemo_config
from tests.unit.formats import tiny_models as tiny

WINDOWED = ("mistral_v01", "qwen25", "qwen3", "mixtral", "qwen3_moe")


def _windowed(model: str, window: int | None) -> Architecture:
    return replace(architecture_from_hf(tiny.config(model).to_dict()), sliding_window=window)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("model", WINDOWED)
def test_descriptions(model: str, window: int | None) -> None:
    architecture = _windowed(model, window)
    written = architecture_to_hf(architecture)
    assert architecture_from_hf(written) == architecture
    # What transformers understands: the window of each layer.
    theirs = AutoConfig.for_model(**{name: value for name, value in written.items() if name != "architectures"})
    kinds = getattr(theirs, "layer_types", ["sliding_attention"] * architecture.num_layers)
    assert [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds] == [
        window
    ] * architecture.num_layers
    found = architecture_from_nemo(nemo_config(architecture, "bf16", {}), architecture.vocab_size, "model_config.yaml")
    # A Mistral without window is a Llama: the file holds no family.
    assert replace(found, model_type=architecture.model_type) == architecture


def test_every_family_with_a_window_is_tried() -> None:
    assert {tiny.config(model).model_type for model in WINDOWED} == {
        name for name, family in FAMILIES.items() if family.window is not None
    }

"""Rotary frequencies and the norm against transformers'."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.model.norm import RecomputedRMSNorm, RMSNorm
from nemo_lmpo.model.rotary import PositionedRotaryEmbedding, inverse_frequencies

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama31": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
    "llama32": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    "llama3_short": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 64},
}
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0), (16, 1e6)])
def test_frequencies_and_angles(scaling: str, head_dim: int, theta: float) -> None:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=8,
        rope_theta=theta,
        rope_scaling=copy.deepcopy(SCALINGS[scaling]),  # transformers writes into it
        max_position_embeddings=131072,
    )
    architecture = architecture_from_hf(config.to_dict())
    assert architecture.rope_theta == theta
    assert (architecture.rope_scaling is None) == (scaling == "default")
    theirs = LlamaRotaryEmbedding(config)
    torch.testing.assert_close(inverse_frequencies(architecture), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 2, 1, 2, 77, 4095]])
    module = PositionedRotaryEmbedding(architecture)
    module.position_ids = positions
    angles = module(0)
    assert angles.shape == (7, 1, 1, head_dim)
    assert angles.dtype == torch.float32
    cosine, sine = theirs(torch.zeros(1, 7, 4), positions)
    # An angle of 4095 radians holds float32's 2^-24 of it.
    torch.testing.assert_close(angles.squeeze().cos(), cosine[0], rtol=0, atol=4095 * 2.0**-23)
    torch.testing.assert_close(angles.squeeze().sin(), sine[0], rtol=0, atol=4095 * 2.0**-23)


def test_frequencies_stay_float32_where_weights_are_not() -> None:
    """A bfloat16 frequency errs by 2^-9: at position 4,000 that is a turn."""
    architecture = architecture_from_hf({**SMALL, "max_position_embeddings": 8192})
    module = PositionedRotaryEmbedding(architecture)
    module.position_ids = torch.tensor([[4000]])
    exact = module(0)
    assert torch.equal(module.to(torch.bfloat16)(0), exact)
    assert not module.state_dict(), "checkpoints hold no frequencies"
    assert module.to("meta").inverse_frequencies.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("kind", [RMSNorm, RecomputedRMSNorm])
def test_norm(kind: type[RMSNorm], dtype: torch.dtype, eps: float) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = (torch.randn(5, 1, 48, generator=generator) * 0.1).to(dtype)
    weight = torch.rand(48, generator=generator).to(dtype) + 0.5
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    ours, theirs = kind(config, 48, eps=eps), LlamaRMSNorm(48, eps=eps)
    results = []
    for module in (ours, theirs):
        module.weight.data = weight.clone()
        inputs = hidden.clone().requires_grad_()
        output = module(inputs)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        results.append((output, inputs.grad, module.weight.grad))
    # transformers rounds once more, before the weight: bfloat16 has 8 bits.
    tolerance = 1e-6 if dtype == torch.float32 else 2 * 2.0**-8
    for our, their in zip(*results, strict=True):
        assert (our.double() - their.double()).norm() < tolerance * their.double().norm()


def test_norm_is_marked_for_sequence_parallelism() -> None:
    for on in (True, False):
        config: Any = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=on)
        weight: Any = RMSNorm(config, 4).weight
        assert weight.sequence_parallel is on

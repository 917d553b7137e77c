"""Sources of weights, and loading them into models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file
from torch import nn

from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.formats.architecture import Architecture, architecture_from_hf
from nemo_lmpo.formats.huggingface import HuggingFaceSource
from nemo_lmpo.formats.source import RandomSource, check_source
from nemo_lmpo.model.load_weights import load_model_weights
from tests.unit.formats import tiny_models as tiny

_ARCHITECTURE = architecture_from_hf(tiny.config("llama3").to_dict())


def test_random_weights_have_megatrons_spread() -> None:
    architecture = Architecture(**{**vars(_ARCHITECTURE), "hidden_size": 512, "ffn_hidden_size": 1024, "head_dim": 128})
    source = RandomSource(architecture, seed=5)
    sigma = architecture.initializer_range
    assert source.get("model.layers.0.mlp.up_proj.weight").std().item() == pytest.approx(sigma, rel=0.01)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        found = source.get(f"model.layers.1.{name}.weight")
        assert found.std().item() == pytest.approx(sigma / math.sqrt(2 * 4), rel=0.01)
        assert abs(found.mean().item()) < 0.001
    assert torch.equal(source.get("model.norm.weight"), torch.ones(512))


def test_random_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = (RandomSource(_ARCHITECTURE, seed) for seed in (1, 1, 2))
    names = first.names()
    in_reverse = {name: again.get(name) for name in reversed(names)}
    for name in names:
        assert torch.equal(first.get(name), in_reverse[name]), name
    assert not torch.equal(first.get(names[0]), other.get(names[0]))
    gate, up = (first.get(f"model.layers.0.mlp.{part}_proj.weight") for part in ("gate", "up"))
    assert not torch.equal(gate, up)
    half = RandomSource(_ARCHITECTURE, 1, torch.bfloat16)
    assert torch.equal(half.get(names[1]), first.get(names[1]).to(torch.bfloat16))


def test_safetensors_are_read_lazily_and_exactly(tmp_path: Path) -> None:
    path = tiny.save("llama2", tmp_path / "hf", torch.bfloat16)
    source = HuggingFaceSource(path)
    expected = load_file(path / "model.safetensors")
    assert set(source.names()) == expected.keys()
    for name, tensor in expected.items():
        assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), torch.bfloat16)
        assert torch.equal(source.get(name), tensor)
    check_source(source, architecture_from_hf(tiny.config("llama2").to_dict()))


def test_old_rotary_tensors_are_ignored(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tiny.save("llama2", tmp_path / "hf")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    check_source(HuggingFaceSource(path), architecture_from_hf(tiny.config("llama2").to_dict()))


class _Layer(nn.Module):
    def __init__(self, number: int, qkv_rows: int) -> None:
        super().__init__()
        self.layer_number = number
        self.self_attention = nn.Module()
        self.self_attention.linear_qkv = nn.Linear(64, qkv_rows, bias=False)
        self.self_attention.linear_qkv.layer_norm_weight = nn.Parameter(torch.zeros(64))


class _Model(nn.Module):
    """The parts of a pipeline stage that the test looks at, with Transformer Engine's names."""

    def __init__(self, numbers: list[int], qkv_rows: int = 128) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_Layer(number, qkv_rows) for number in numbers)


class _Wrapper(Float16Module):
    """Holds a model as megatron-core's 16-bit wrapper does, without casting it."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_layers_go_by_their_number_and_through_wrappers() -> None:
    source = RandomSource(_ARCHITECTURE, 0)
    chunks: list[Any] = [_Wrapper(_Wrapper(_Model([2]).to(torch.bfloat16))), _Wrapper(_Model([4, 1]))]
    load_model_weights(list(chunks), source, _ARCHITECTURE, tp_rank=0, tp_size=1)
    for parameter, layer in (
        (chunks[0].module.module.decoder.layers[0], 1),
        (chunks[1].module.decoder.layers[0], 3),
        (chunks[1].module.decoder.layers[1], 0),
    ):
        weight = parameter.self_attention.linear_qkv.weight
        # Two groups of two query heads of 16: the second group's key stands at rows 64 + 32 .. 64 + 48.
        key = source.get(f"model.layers.{layer}.self_attn.k_proj.weight")[16:]
        assert torch.equal(weight[96:112], key.to(weight.dtype))
        assert torch.equal(parameter.self_attention.linear_qkv.layer_norm_weight, torch.ones(64).to(weight.dtype))


def test_loading_lists_everything_that_does_not_fit() -> None:
    model = _Model([1], qkv_rows=120)
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(CheckpointError) as caught:
        load_model_weights([model], RandomSource(_ARCHITECTURE, 0), _ARCHITECTURE, tp_rank=0, tp_size=1)
    assert "1 unexpected tensors: extra" in str(caught.value)
    assert "decoder.layers.0.self_attention.linear_qkv.weight is [120, 64] instead of [128, 64]" in str(caught.value)


def test_source_of_another_model_is_refused_before_anything_is_written() -> None:
    other = architecture_from_hf(tiny.config("llama2").to_dict())
    model: Any = _Model([1])
    before = model.decoder.layers[0].self_attention.linear_qkv.weight.clone()
    with pytest.raises(CheckpointError, match="tensors of the wrong shape"):
        load_model_weights([model], RandomSource(other, 0), _ARCHITECTURE, tp_rank=0, tp_size=1)
    assert torch.equal(model.decoder.layers[0].self_attention.linear_qkv.weight, before)


def test_tensor_parallel_size_must_divide_the_groups() -> None:
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=4 does not divide 2"):
        load_model_weights([_Model([1])], RandomSource(_ARCHITECTURE, 0), _ARCHITECTURE, tp_rank=0, tp_size=4)

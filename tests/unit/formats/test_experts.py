"""A mixture's tensors are the same bits in every form that others keep them in; other mixtures are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.architecture import architecture_from_hf, architecture_to_hf
from nemo_lmpo.formats.huggingface import write_safetensors
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.nemo import architecture_from_nemo, architecture_from_nemo2, nemo_config
from nemo_lmpo.formats.older_transformers import older_config
from nemo_lmpo.formats.source import TensorSource
from tests.unit.formats import tiny_models as tiny

MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe_plain")


def assert_same(found: TensorSource, expected: TensorSource) -> None:
    assert sorted(found.names()) == sorted(expected.names())
    for name in expected.names():
        assert torch.equal(found.get(name), expected.get(name)), name


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_and_apart(family: str, tmp_path: Path) -> None:
    """Transformers 5 writes a tensor for each expert, as 4 does, or all of a layer in one."""
    apart, fused = (
        tiny.save(family, tmp_path / name, save_original_format=flag) for name, flag in (("a", True), ("b", False))
    )
    first, second = open_model(apart), open_model(fused)
    assert first.architecture == second.architecture
    assert any("experts.gate_up_proj" in stored for stored in _stored(fused))
    assert not any("experts.gate_up_proj" in stored for stored in _stored(apart))
    assert_same(second.source, first.source)


def _stored(directory: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def test_what_is_written_is_what_transformers_reads(tmp_path: Path) -> None:
    model = open_model(tiny.save("mixtral", tmp_path / "fused", save_original_format=False))
    (tmp_path / "out").mkdir()
    write_safetensors(tmp_path / "out", model.source, dtype=torch.float32)
    (tmp_path / "out" / "config.json").write_text(json.dumps(architecture_to_hf(model.architecture)))
    theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("fused", "out"))
    expected, found = theirs
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", MIXTURES)
def test_descriptions(family: str) -> None:
    architecture = architecture_from_hf(tiny.config(family).to_dict())
    assert architecture_from_hf(architecture_to_hf(architecture)) == architecture
    found = architecture_from_nemo(nemo_config(architecture, "bf16", {}), architecture.vocab_size, "model_config.yaml")
    assert found == architecture
    # What transformers 5 calls experts of any family, 4.57 takes for 128 without a word.
    older = older_config(tiny.config(family).to_dict(), architecture)
    assert older[architecture.family.experts.number] == architecture.experts.number


def _nemo2(**changes: Any) -> dict[str, Any]:
    config = {
        **{"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "seq_length": 256},
        **{"num_query_groups": 2, "layernorm_epsilon": 1e-5, "normalization": "RMSNorm", "gated_linear_unit": True},
        **{"position_embedding_type": "rope", "add_bias_linear": False, "num_moe_experts": 4, "moe_router_topk": 2},
    }
    return {"_target_": "nemo.collections.llm.gpt.model.mixtral.MixtralModel", "config": {**config, **changes}}


def test_nemo2(caplog: pytest.LogCaptureFixture) -> None:
    """NeMo 2 says of every Mixtral that it takes the softmax before the choice, whose weights do sum to one."""
    found = architecture_from_nemo2(_nemo2(moe_router_pre_softmax=True), 300, "model.yaml")
    assert (found.model_type, found.experts.number, found.experts.normalized) == ("mixtral", 4, True)
    assert "moe_router_pre_softmax is set" in caplog.text
    qwen = _nemo2(moe_ffn_hidden_size=40, qk_layernorm=True)
    qwen["_target_"] = "nemo.collections.llm.gpt.model.qwen3.Qwen3Model"
    found = architecture_from_nemo2(qwen, 300, "model.yaml")
    assert (found.model_type, found.experts.ffn_hidden_size) == ("qwen3_moe", 40)
    dense = {**qwen, "config": {**qwen["config"], "num_moe_experts": None}}
    assert architecture_from_nemo2(dense, 300, "model.yaml").model_type == "qwen3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_shared_expert_intermediate_size", 64),
        ("moe_layer_freq", 2),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_router_topk", 9),
    ],
)
def test_other_routers_of_nemo(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=name):
        architecture_from_nemo2(_nemo2(**{name: value}), 300, "model.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("quantization_config", {"quant_method": "gptq"}),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 1),
        ("num_local_experts", 1),
        ("router_jitter_noise", 0.1),
    ],
)
def test_other_mixtures(name: str, value: object) -> None:
    config = {**tiny.config("qwen3_moe").to_dict(), name: value}
    with pytest.raises(CheckpointError, match=name):
        architecture_from_hf(config)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_engine_that_answers_has_all_weights(family: str, tmp_path: Path) -> None:
    """It makes transformers' model of tensors in memory, which may keep experts in another form than files do."""
    from nemo_lmpo.answers.engine import transformers_model

    directory = tiny.save(family, tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    found = transformers_model(open_model(directory), torch.float32).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

"""One process writes a checkpoint; every tensor- and pipeline-parallel layout loads it, on real processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_lmpo.checkpoint.writers import collect_write_results
from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.formats.architecture import Architecture, RopeScaling
from nemo_lmpo.formats.archive import DirectoryFiles
from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
from nemo_lmpo.formats.distributed_writer import write_distributed_checkpoint
from nemo_lmpo.formats.megatron import MegatronSource
from nemo_lmpo.formats.sinks import DirectorySink
from nemo_lmpo.formats.source import RandomSource
from nemo_lmpo.model.load_weights import load_model_weights
from nemo_lmpo.parallel.groups import ParallelGroups, create_groups, destroy_groups, start_process_group
from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.workers import run_workers

_UNTIED = Architecture(
    model_type="llama",
    vocab_size=259,
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=4,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
)
_QWEN2 = Architecture(**{**vars(_UNTIED), "model_type": "qwen2", "rope_scaling": None})
_QWEN3 = Architecture(**{**vars(_UNTIED), "model_type": "qwen3", "rope_scaling": None, "head_dim": 24})
_TIED = Architecture(**{**vars(_UNTIED), "tie_word_embeddings": True, "vocab_size": 131})
_LAYOUTS = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "pp2_vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


@contextmanager
def _joined(launch: LaunchInfo) -> Iterator[None]:
    """This worker's place in a gloo group, with megatron-core on the CPU."""
    warnings.simplefilter("ignore")
    with on_cpu():
        start_process_group(launch, use_cuda=False)
        try:
            yield
        finally:
            destroy_groups()


def _chunks(layout: dict[str, int], architecture: Architecture) -> tuple[list[Any], ParallelGroups]:
    from nemo_lmpo.model.build import build_model_chunks
    from nemo_lmpo.model.kernels import Kernels

    config = ModelConfig(**layout, transformer_engine=False)  # type: ignore[arg-type]
    groups = create_groups(config)
    kernels = Kernels(transformer_engine=False, attention="sdpa")
    chunks = build_model_chunks(
        architecture, config, groups=groups, dtype=torch.float32, device=torch.device("cpu"), kernels=kernels
    )
    return list(chunks), groups


def _expected(name: str, layer: int, architecture: Architecture, tp: int, rank: int, hf: dict[str, Tensor]) -> Tensor:
    """A rank's part of a parameter, written down for this test from Megatron's conventions."""
    a = architecture
    prefix = f"model.layers.{layer}."

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(tp, dim=0)[rank]

    if "word_embeddings" in name or "output_layer" in name:
        tied = a.tie_word_embeddings or "word_embeddings" in name
        table = hf["model.embed_tokens.weight" if tied else "lm_head.weight"]
        padded = torch.zeros(-(-a.vocab_size // (128 * tp)) * 128 * tp, a.hidden_size)
        padded[: a.vocab_size] = table
        return rows(padded)
    if "linear_qkv" in name:
        kind = "bias" if name.endswith(".bias") else "weight"
        q, k, v = (hf[prefix + f"self_attn.{part}_proj.{kind}"] for part in "qkv")
        per_group = a.num_attention_heads // a.num_query_groups * a.head_dim
        spans = []
        for group in range(a.num_query_groups):
            spans.append(q[group * per_group : (group + 1) * per_group])
            spans.append(k[group * a.head_dim : (group + 1) * a.head_dim])
            spans.append(v[group * a.head_dim : (group + 1) * a.head_dim])
        return rows(torch.cat(spans))
    if "linear_fc1" in name:
        return torch.cat([rows(hf[prefix + f"mlp.{part}_proj.weight"]) for part in ("gate", "up")])
    if "linear_proj" in name:
        return hf[prefix + "self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
    if "linear_fc2" in name:
        return hf[prefix + "mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
    if "q_layernorm" in name or "k_layernorm" in name:
        return hf[prefix + f"self_attn.{'q' if 'q_layernorm' in name else 'k'}_norm.weight"]
    if "final_layernorm" in name:
        return hf["model.norm.weight"]
    return hf[prefix + ("input" if "input" in name else "post_attention") + "_layernorm.weight"]


class _OddNorms(RandomSource):
    """Random start weights whose norms are not all ones, which would hide a mix-up."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture, 3)

    def get(self, name: str) -> Tensor:
        tensor = super().get(name)
        return tensor + torch.arange(len(tensor)) + sum(map(ord, name)) / 1000 if tensor.dim() == 1 else tensor


def _load_and_compare(launch: LaunchInfo, layout: dict[str, int], architecture: Architecture, checkpoint: str) -> None:
    from megatron.core import dist_checkpointing

    with _joined(launch):
        chunks, groups = _chunks(layout, architecture)
        tp, rank = groups.tensor.size(), groups.tensor.rank()
        source = _OddNorms(architecture)
        _spoil(chunks)
        load_model_weights(chunks, source, architecture, tp_rank=rank, tp_size=tp)
        _compare(chunks, architecture, tp, rank)

        _spoil(chunks)
        state = {f"model{index}": chunk.sharded_state_dict(prefix="model.") for index, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(state, checkpoint)
        for index, chunk in enumerate(chunks):
            found = {key.removeprefix("model."): value for key, value in loaded[f"model{index}"].items()}
            chunk.load_state_dict(found)
        _compare(chunks, architecture, tp, rank)


def _spoil(chunks: list[Any]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def _compare(chunks: list[Any], architecture: Architecture, tp: int, rank: int) -> None:
    source = _OddNorms(architecture)
    hf = {name: source.get(name) for name in source.names()}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            layer = 0
            if ".layers." in name:
                number = int(name.split(".layers.")[1].split(".")[0])
                layer = chunk.decoder.layers[number].layer_number - 1
            assert torch.equal(parameter, _expected(name, layer, architecture, tp, rank, hf)), name


@pytest.mark.parametrize(
    ("layout", "architecture"),
    [
        *((layout, architecture) for layout in _LAYOUTS for architecture in (_UNTIED, _TIED)),
        *(("tp2", _QWEN2), ("tp2", _QWEN3)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.model_type}_{value.vocab_size}",
)
def test_every_layout_loads_what_one_process_wrote(layout: str, architecture: Architecture, tmp_path: Path) -> None:
    sink = DirectorySink(tmp_path / "nemo")
    source = _OddNorms(architecture)
    write_distributed_checkpoint(sink, "model_weights", source, architecture, prefix="model.", dtype=torch.float32)
    sink.close()
    sizes = _LAYOUTS[layout]
    world = sizes.get("tensor_model_parallel_size", 1) * sizes.get("pipeline_model_parallel_size", 1)
    run_workers(world, _load_and_compare, sizes, architecture, str(tmp_path / "nemo" / "model_weights"))


def _load_and_save(launch: LaunchInfo, layout: dict[str, int], architecture: Architecture, directory: str) -> None:
    from megatron.core import dist_checkpointing

    with _joined(launch):
        chunks, groups = _chunks(layout, architecture)
        tp, rank = groups.tensor.size(), groups.tensor.rank()
        load_model_weights(chunks, _OddNorms(architecture), architecture, tp_rank=rank, tp_size=tp)
        state = {f"model{index}": chunk.sharded_state_dict(prefix="model.") for index, chunk in enumerate(chunks)}
        collect_write_results()  # else megatron-core starts a process for the queue, which imports all
        dist_checkpointing.save(state, directory)


@pytest.mark.parametrize("layout", ["tp2", "tp2_pp2", "pp2_vpp2"])
@pytest.mark.parametrize("architecture", [_UNTIED, _TIED], ids=["untied", "tied"])
def test_one_process_reads_what_every_layout_saved(layout: str, architecture: Architecture, tmp_path: Path) -> None:
    """As megatron-core itself saves it: padded vocabulary, chunks by rank, its own metadata classes."""
    (tmp_path / "state").mkdir()
    sizes = _LAYOUTS[layout]
    world = sizes.get("tensor_model_parallel_size", 1) * sizes.get("pipeline_model_parallel_size", 1)
    run_workers(world, _load_and_save, sizes, architecture, str(tmp_path / "state"))
    found = MegatronSource(DistributedCheckpoint(DirectoryFiles(tmp_path), "state"), architecture)
    expected = _OddNorms(architecture)
    assert found.names() == expected.names()
    for name in expected.names():
        assert torch.equal(found.get(name), expected.get(name)), name


def test_trained_model_generates_with_transformers(tmp_path: Path) -> None:
    """Train two ways parallel, export in one process: the result loads with both Auto classes and generates."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_lmpo.convert.command import nemo_to_hf
    from tests.distributed.training_runs import train

    overrides = ("model.tensor_model_parallel_size=2", "trainer.max_steps=1")
    run_workers(2, train, str(tmp_path / "run"), overrides)
    step = tmp_path / "run" / "checkpoints" / "step_0000001"
    assert nemo_to_hf(["--input", str(step), "--output", str(tmp_path / "hf"), "--verify", "--quiet"]) == 0
    model, information = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]

"""Checkpoints of mixtures resume over other numbers of expert-parallel ranks, and are models for everything else."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.mixture_runs import EP, TP, assert_equal_runs, balance, run
from tests.distributed.test_layouts import assert_same_metrics_in_bfloat16
from tests.distributed.test_rounded_moments import moments_of
from tests.distributed.training_runs import metrics_of
from tests.distributed.workers import run_workers

HALT = ("checkpoint.save_interval=1", "checkpoint.keep_last=9")


def resumed_from(directory: Path, step: int, where: Path) -> Path:
    """A copy of a run as it was after ``step``."""
    shutil.copytree(directory, where)
    for later in (where / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    lines = (where / "metrics.jsonl").read_text().splitlines(keepends=True)
    (where / "metrics.jsonl").write_text("".join(lines[:step]))
    return where


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(1, tmp_path_factory.mktemp("one") / "run", (*balance("sequence"), *HALT))


def test_one_two_one(one_process: Path, tmp_path: Path) -> None:
    """The second step on two ranks with the distributed optimizer, which share the experts; the third on one again."""
    first = resumed_from(one_process, 1, tmp_path / "two")
    run(2, first, (*balance("sequence"), *HALT, *TP, *EP, "optim.use_distributed_optimizer=true"))
    assert_equal_runs(first, one_process)
    second = resumed_from(first, 2, tmp_path / "one")
    run(1, second, (*balance("sequence"), *HALT))
    assert_equal_runs(second, one_process)


def test_bfloat16_moments_of_experts_resume_bit_for_bit(tmp_path: Path) -> None:
    """Moments of experts and of the rest are in two optimizers, each rounded by itself and shared by its own ranks."""
    rounded = ("trainer.precision=bf16", "optim.moments_dtype=bf16", "optim.use_distributed_optimizer=true")
    whole = run(2, tmp_path / "whole", (*rounded, *HALT, *EP))
    again = resumed_from(whole, 1, tmp_path / "again")
    run(2, again, (*rounded, *HALT, *EP))
    assert metrics_of(again)[-1] == metrics_of(whole)[-1]
    expected = moments_of(whole, 3)
    assert any("experts" in name for name in expected)
    assert {tensor.dtype for tensor in expected.values()} == {torch.bfloat16}
    assert all(tensor.equal(expected[name]) for name, tensor in moments_of(again, 3).items())
    alone = run(1, tmp_path / "one", (*rounded, *HALT))
    assert_same_metrics_in_bfloat16(metrics_of(whole), metrics_of(alone))


def test_export_is_what_transformers_loads(one_process: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from nemo_lmpo.export.write import export_run
    from tests.distributed.training_runs import weights_of

    exported = export_run(one_process, tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights, layer = weights_of(one_process, 3), model.model.layers[1].mlp
    first = "model.layers.1.mlp.experts.5"
    expected = torch.cat([weights[f"{first}.gate_proj.weight"], weights[f"{first}.up_proj.weight"]])
    assert torch.equal(layer.experts.gate_up_proj[5], expected)
    assert torch.equal(layer.experts.down_proj[5], weights[f"{first}.down_proj.weight"])
    assert torch.equal(layer.gate.weight, weights["model.layers.1.mlp.gate.weight"])


OF_DPO = {
    "ep2": (2, EP),
    "tp2_sequence": (2, TP),
    "pp2": (2, ("model.pipeline_model_parallel_size=2",)),
    "dp2_ep2_etp2": (4, (*EP, "model.expert_tensor_parallel_size=2")),
}


@pytest.mark.parametrize("layout", OF_DPO)
@pytest.mark.parametrize("memory", [True, False])
def test_first_loss_of_dpo(memory: bool, layout: str, tmp_path: Path) -> None:
    """Policy and reference choose the same experts, whether the reference is computed before or beside."""
    settings = ("loss=dpo", "trainer.precision=bf16", f"model.reference_in_memory={str(memory).lower()}")
    size, overrides = OF_DPO[layout]
    found = run(
        size,
        tmp_path / "run",
        (*settings, *overrides, "trainer.max_steps=1", "data.train.limit=30", f"data.cache_dir={tmp_path}"),
    )
    assert metrics_of(found)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def save_as_megatron_core_does(launch: LaunchInfo, start: str, output: str, form: str) -> None:
    """Save a model of megatron-core's local layers as they come, whose norms have a dense model's names.

    Its experts are one after the other, or its own ones of a single matrix (`weight1`, `weight2`) for the package
    grouped_gemm, which is not needed to save them.
    """
    from megatron.core import dist_checkpointing

    from nemo_lmpo.convert.megatron import megatron_model
    from nemo_lmpo.formats.model_files import open_model

    model = open_model(Path(start))
    with megatron_model(model.architecture, model.source) as built:
        for layer in built.decoder.layers:
            layer.submodules_config.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
            if form == "grouped_gemm":
                layer.mlp.experts = in_single_matrices(layer.mlp.experts)
        metadata = {"singleton_local_shards": True} if form == "singletons" else None
        dist_checkpointing.save(built.sharded_state_dict(prefix="model.", metadata=metadata), output)


def in_single_matrices(experts: Any) -> Any:
    """megatron-core's `GroupedMLP` with the weights of its experts that are computed one after the other."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import experts as of_megatron_core

    of_megatron_core.gg.assert_grouped_gemm_is_available = lambda: None
    groups = ProcessGroupCollection.use_mpu_process_groups()
    grouped = of_megatron_core.GroupedMLP(experts.num_local_experts, experts.config, groups)
    for whole, name in ((grouped.weight1, "linear_fc1"), (grouped.weight2, "linear_fc2")):
        each = torch.stack([expert.get_submodule(name).weight.T for expert in experts.local_experts])
        whole.data.view(each.shape).copy_(each)
    return grouped


@pytest.mark.parametrize("form", ["sequential", "grouped_gemm"])
def test_what_megatron_core_saves(form: str, tmp_path: Path) -> None:
    """All of its experts are stored in one form, that of Transformer Engine's grouped ones."""
    from megatron.core.transformer.moe import experts

    if form == "grouped_gemm" and not hasattr(experts, "GroupedMLP"):
        pytest.skip("this megatron-core has no experts of a single matrix; 0.16 has")

    from nemo_lmpo.formats.archive import DirectoryFiles
    from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
    from nemo_lmpo.formats.megatron import MegatronSource
    from nemo_lmpo.formats.model_files import open_model
    from tests.unit.formats.tiny_models import save

    start = save("qwen3_moe", tmp_path / "hf")
    (tmp_path / "saved").mkdir()
    run_workers(1, save_as_megatron_core_does, str(start), str(tmp_path / "saved"), form)
    stored, expected = DistributedCheckpoint(DirectoryFiles(tmp_path / "saved")), open_model(start)
    assert tuple(stored.tensors["model.decoder.layers.mlp.experts.experts.linear_fc1.weight"].size) == (2, 6, 80, 64)
    assert "model.decoder.layers.mlp.linear_fc1.layer_norm_weight" in stored.tensors
    found = MegatronSource(stored, expected.architecture)
    assert all(torch.equal(found.get(name), expected.source.get(name)) for name in expected.source.names())


def test_singletons_of_megatron_core_are_refused(tmp_path: Path) -> None:
    """Each expert, and gate and up projection, in a tensor of its own."""
    from nemo_lmpo.formats.archive import DirectoryFiles
    from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
    from nemo_lmpo.formats.megatron import MegatronSource
    from nemo_lmpo.formats.model_files import open_model
    from tests.unit.formats.tiny_models import save

    start = save("mixtral", tmp_path / "hf")
    (tmp_path / "saved").mkdir()
    run_workers(1, save_as_megatron_core_does, str(start), str(tmp_path / "saved"), "singletons")
    stored = DistributedCheckpoint(DirectoryFiles(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=r"singleton_local_shards \(model\.decoder.*weight_v\).*save it without"):
        MegatronSource(stored, open_model(start).architecture)


def test_adapters_on_attention(tmp_path: Path) -> None:
    """Beside frozen experts that lie on two ranks; merged, they are a model."""
    from nemo_lmpo.formats.model_files import open_model

    lora = ("model.peft.name=lora", "model.peft.rank=4", "model.peft.target_modules=[q_proj,o_proj]")
    one, two = (run(size, tmp_path / str(size), (*lora, *more)) for size, more in ((1, ()), (2, EP)))
    lines, expected = metrics_of(two), metrics_of(one)
    for line, wanted in zip(lines, expected, strict=True):
        assert line["val/loss" if "val/loss" in line else "loss"] == pytest.approx(
            wanted["val/loss" if "val/loss" in wanted else "loss"], rel=1e-5
        )
    merged = [open_model(directory / "checkpoints" / "step_0000003").source for directory in (one, two)]
    changed = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[0].get(changed), merged[1].get(changed), rtol=1e-5, atol=1e-7)

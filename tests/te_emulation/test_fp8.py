"""`model.fp8`: Transformer Engine's layers train on FP8 products as its definition says, in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf, verify
from nemo_lmpo.formats.distributed_reader import state_metadata
from tests.distributed.test_layouts import STEPS, assert_same_metrics
from tests.distributed.training_runs import metrics_of
from tests.te_emulation import runs
from tests.te_emulation.host import Host
from tests.te_emulation.test_gradients_in_place import distance
from tests.te_emulation.test_layouts_on_te import FULL, PP2, SHARDED, STEADY, TP2_SEQUENCE

# Sizes that blocks of 128 divide, over two ranks, too.
BF16 = ("trainer.precision=bf16", "model.architecture.hidden_size=256", "model.architecture.intermediate_size=256")
KINDS = ("hybrid", "tensorwise", "blockwise")
ROUNDING = 2.0**-3 / math.sqrt(12)
"""Root mean square of the relative error of one rounding to E4M3, which has 4 significant bits."""
LAYERS, PAIRS = 4, 12
APART = 4 * ROUNDING * math.sqrt(2 * LAYERS / PAIRS)
"""How far losses of two layouts may differ that round differently: as docs/architecture.md derives it for BF16."""
Reference = Callable[[str], Path]


@pytest.fixture(scope="module")
def reference(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Runs of one process in FP8, by its kind."""
    done: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp(kind) / "run"
            host.run(1, runs.train_te, str(done[kind]), (*BF16, *STEADY, f"model.fp8={kind}"))
        return done[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_multiplies_what_was_rounded(kind: str, host: Host) -> None:
    """Output, gradient of the input and of the weight; the results are rounded to BF16 once, by half a unit at most."""
    ((found, expected),) = host.run(1, runs.linear_in_fp8, kind)
    for mine, by_hand in zip(found, expected, strict=True):
        assert distance(mine, by_hand) < 2.0**-8


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_fp8_by_hand(kind: str, host: Host, tmp_path: Path) -> None:
    """Nearer to the definition of their own kind than to that of any other, and than to BF16.

    Numbers that differ by a rounding to BF16 may fall into another step of FP8, so that these are not equal.
    """
    (found,) = host.run(1, runs.gradients, str(tmp_path / "te"), (*BF16, f"model.fp8={kind}"))
    (expected,) = host.run(1, runs.gradients, str(tmp_path / kind), BF16, kind)
    (plain,) = host.run(1, runs.gradients, str(tmp_path / "bf16"), BF16)
    another = "tensorwise" if kind == "hybrid" else "hybrid"
    (other,) = host.run(1, runs.gradients, str(tmp_path / another), BF16, another)
    assert found.keys() == expected.keys()
    linear = [name for name in found if "linear" in name and "norm" not in name]
    assert len(linear) == 4 * LAYERS
    near, far, elsewhere = (
        math.hypot(*(distance(found[name], there[name]) for name in linear)) for there in (expected, plain, other)
    )
    assert near < far
    assert near < elsewhere


@pytest.mark.parametrize("kind", ["hybrid", "blockwise"])
def test_steps_are_those_of_fp8_by_hand(kind: str, host: Host, reference: Reference, tmp_path: Path) -> None:
    """Over steps, with forward passes between them: FP8 copies of weights that were stale would be seen at once."""
    host.run(1, runs.train_by_hand, str(tmp_path / "run"), (*BF16, *STEADY), kind)
    assert_near(metrics_of(reference(kind)), metrics_of(tmp_path / "run"), 0.01)


def assert_near(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    steps = [(mine, theirs) for mine, theirs in zip(found, expected, strict=True) if "loss" in theirs]
    assert len(steps) == STEPS
    for mine, theirs in steps:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance * math.sqrt(2))


EXACT = {
    "pp2_vpp2_recomputed": (*PP2, "model.virtual_pipeline_model_parallel_size=2", *FULL),
    "dp2_mlp_recomputed": (*SHARDED, "model.activations_checkpoint_granularity=selective"),
}


@pytest.mark.parametrize("layout", EXACT)
def test_layouts_that_multiply_the_same_matrices(layout: str, host: Host, reference: Reference, tmp_path: Path) -> None:
    host.run(2, runs.train_te, str(tmp_path / "run"), (*BF16, *STEADY, "model.fp8=hybrid", *EXACT[layout]))
    assert_same_metrics(metrics_of(tmp_path / "run"), metrics_of(reference("hybrid")))


@pytest.mark.parametrize("kind", ["hybrid", "blockwise"])
def test_tensor_parallel_ranks_round_their_own_parts(
    kind: str, host: Host, reference: Reference, tmp_path: Path
) -> None:
    """Matrices are cut, so scales are others; numbers of the sequence's parts are gathered in FP8."""
    overrides = (*BF16, *STEADY, f"model.fp8={kind}", *TP2_SEQUENCE, *FULL)
    for calls in host.run(2, runs.train_te, str(tmp_path / "run"), overrides):
        assert calls["gemm_fp8"] == calls["gemm"] + calls["gemm_accumulated"], "layers' products only"
    assert_near(metrics_of(tmp_path / "run"), metrics_of(reference(kind)), APART)


def test_checkpoints_are_those_of_bf16(host: Host, reference: Reference, tmp_path: Path) -> None:
    """A run in FP8 resumes bit for bit, though its checkpoints hold no scales; and BF16 goes on from it."""
    for steps in range(1, STEPS + 1):
        host.run(1, runs.train_te, str(tmp_path), (*BF16, *STEADY, "model.fp8=hybrid", f"trainer.max_steps={steps}"))
    losses = [[line["loss"] for line in metrics_of(run) if "loss" in line] for run in (tmp_path, reference("hybrid"))]
    assert losses[0] == losses[1]
    for run in (tmp_path, reference("hybrid")):
        found = state_metadata(run / "checkpoints" / f"step_{STEPS:07d}" / "state").state_dict_metadata
        assert not [key for key in found if "_extra_state" in key]
    on = ("checkpoint.allow_changes=[model.fp8]", f"trainer.max_steps={STEPS + 1}")
    host.run(1, runs.train_local, str(tmp_path), (*BF16, *STEADY, *on))
    assert len([line for line in metrics_of(tmp_path) if "loss" in line]) == STEPS + 1


def test_exports_are_those_of_any_run(reference: Reference, tmp_path: Path) -> None:
    """A Hugging Face directory and a `.nemo` file of a run in FP8 hold its tensors in BF16, and nothing of scales."""
    run = reference("hybrid")
    assert nemo_to_hf(["--input", str(run), "--output", str(tmp_path / "hf"), "--quiet"]) == 0
    assert verify(["--hf", str(tmp_path / "hf"), "--nemo", str(run), "--quiet"]) == 0
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert not [name for name in found if "_extra_state" in name or "scale" in name]
    assert (
        hf_to_nemo(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "m.nemo"), "--verify", "--quiet"]) == 0
    )


@pytest.mark.parametrize("kind", [None, "hybrid"])
def test_collectives_inside_of_products(kind: str | None, host: Host, reference: Reference, tmp_path: Path) -> None:
    """Buffers hold a row of one length; what Transformer Engine does with them trains like one process."""
    fp8 = () if kind is None else (f"model.fp8={kind}",)
    overrides = (*BF16, *STEADY, *TP2_SEQUENCE, "model.tp_comm_overlap=true", *fp8)
    for asked in host.run(2, runs.train_on_userbuffers, str(tmp_path / "run"), overrides):
        assert {(tuple(shape), ranks) for shape, _, ranks in asked} == {((160, 256), 2)}
        assert len(asked) == 12
        assert sum(size == 1 for _, size, _ in asked) == (8 if kind else 0), "gathered in FP8, scattered in BF16"
    if kind is None:
        host.run(1, runs.train_te, str(tmp_path / "one"), (*BF16, *STEADY))
        assert_near(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "one"), 0.007)
    else:
        assert_near(metrics_of(tmp_path / "run"), metrics_of(reference(kind)), APART)

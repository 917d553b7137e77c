"""Transformer Engine's linear layers add their weights' gradients to the float32 buffer inside the matrix product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.te_emulation import runs
from tests.te_emulation.host import Host

SETTINGS = {
    "float32": (),
    "float32_recomputed": ("model.activations_checkpoint_granularity=full",),
    "bf16": ("trainer.precision=bf16",),
}
# Of one sum of up to a hundred products of float32, taken in another order; and bfloat16's half unit in the last place,
# to which megatron-core's way rounds the gradient of each micro-batch.
TOLERANCE = {"float32": 1e-6, "float32_recomputed": 1e-6, "bf16": 2.0**-8}
LINEARS = 4 * 4


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_gradient_is_added_once(setting: str, host: Host, tmp_path: Path) -> None:
    (found,) = host.run(1, runs.accumulate, str(tmp_path / "run"), SETTINGS[setting])
    (fused, in_place), (twice, in_place_again), (unfused, never) = (
        found[name] for name in ("fused", "twice", "unfused")
    )
    assert found["linears"] == LINEARS
    assert found["micro_batches"] > 1
    # The first micro-batch of all writes over the cleared buffer, unless its layers have run forward once already.
    first = 0 if setting.endswith("recomputed") else LINEARS
    assert in_place == LINEARS * found["micro_batches"] - first
    assert in_place_again == LINEARS * found["micro_batches"]
    assert never == 0
    assert len(fused) > LINEARS
    for name, gradient in unfused.items():
        assert distance(fused[name], gradient) < TOLERANCE[setting], name
        assert distance(twice[name], 2 * fused[name]) < TOLERANCE["float32"], name
    linear = "decoder.layers.0.mlp.linear_fc1.weight"
    assert (distance(fused[linear], unfused[linear]) > 1e-5) == (setting == "bf16"), "only one of them rounds"

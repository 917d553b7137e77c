"""Compare two models tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.conversion import tensor_names
from nemo_lmpo.formats.model_files import ModelFiles

_BLOCK_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of all tensors, and where it is."""

    largest: float
    name: str
    num_different: int
    """Tensors with any difference."""
    num_tensors: int


def compare_tensors(
    reference: ModelFiles,
    converted: ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Difference:
    """Compare all tensors; with ``dtype``, both sides are rounded to it first.

    A NaN on one side only, or at different places, counts as an infinite difference.

    Raises:
        CheckpointError: the models do not have the same tensors.
    """
    _refuse_different_models(reference, converted)
    names = tensor_names(reference)
    largest, worst, different = 0.0, "", 0
    for name in names:
        found = _largest_difference(reference.source.get(name), converted.source.get(name), dtype)
        different += found > 0
        if found > largest or not worst:
            largest, worst = found, name
        progress(name)
    return Difference(largest, worst, different, len(names))


_WITHOUT_EFFECT = {"model_type", "max_position_embeddings", "initializer_range", "tie_word_embeddings"}
"""Fields that do not change what a model computes; NeMo does not keep all of them."""


def _refuse_different_models(reference: ModelFiles, converted: ModelFiles) -> None:
    left, right = asdict(reference.architecture), asdict(converted.architecture)
    differing = [
        f"{name} {left[name]!r} and {right[name]!r}"
        for name in left
        if name not in _WITHOUT_EFFECT and left[name] != right[name]
    ]
    if differing:
        raise CheckpointError(f"{reference.origin} and {converted.origin} are different models: {'; '.join(differing)}")
    lacking = sorted(set(tensor_names(reference)) - set(tensor_names(converted)))
    if lacking:
        raise CheckpointError(f"{converted.origin} lacks tensors of {reference.origin}: {', '.join(lacking)}")


def _largest_difference(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype | None) -> float:
    left, right = left.reshape(-1), right.reshape(-1)
    largest = 0.0
    for start in range(0, left.numel(), _BLOCK_ELEMENTS):
        a, b = left[start : start + _BLOCK_ELEMENTS], right[start : start + _BLOCK_ELEMENTS]
        if dtype is not None:
            a, b = a.to(dtype), b.to(dtype)
        a, b = a.double(), b.double()
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        # Equal infinities differ by NaN, which nan_to_num makes 0.
        difference = (a - b).abs().masked_fill(a == b, 0.0).nan_to_num(nan=0.0, posinf=float("inf"))
        largest = max(largest, float(difference.max()))
    return largest

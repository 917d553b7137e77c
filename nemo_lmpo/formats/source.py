"""Where weights come from: named tensors, read one at a time."""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from nemo_lmpo.errors import CheckpointError, Lines, printable
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.mapping import HF_EMBEDDING, HF_OUTPUT, hf_shapes

_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
"""Rotary frequencies that old files carry, of each layer or of the model; they follow from the config."""
_MOST_NAMED = 40


class TensorSource(ABC):
    """Tensors under Hugging Face names, with their shapes; errors call the source by its ``origin``."""

    def __init__(self, origin: str, shapes: dict[str, tuple[int, ...]]) -> None:
        self.origin = origin
        self._shapes = shapes

    def names(self) -> list[str]:
        """All names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading the tensor."""
        return self._shapes[name]

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype, without reading the tensor."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """The tensor on the CPU, where possible a lazy view of the file; do not write to it."""


def check_source(source: TensorSource, architecture: Architecture) -> None:
    """Compare names and shapes with what the architecture has; no tensors are read but an output layer's, if tied.

    Raises:
        CheckpointError: with missing, unexpected and mis-shaped tensors; or an output layer of its own in a model that
            is said to share its embedding.
    """
    expected = hf_shapes(architecture)
    present = {name for name in source.names() if not _IGNORED.fullmatch(name)}
    allowed = expected.keys() | ({HF_OUTPUT} if architecture.tie_word_embeddings else set())
    wrong_shapes = [
        f"{name} is {list(source.shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in present and tuple(source.shape(name)) != shape
    ]
    raise_if_any(
        source.origin,
        missing=expected.keys() - present,
        unexpected=present - allowed,
        wrong_shapes=wrong_shapes,
        remedy="give the config that belongs to the weights",
    )
    if architecture.tie_word_embeddings and HF_OUTPUT in present:
        check_tied(source.origin, source.get(HF_EMBEDDING), source.get(HF_OUTPUT), "tie_word_embeddings: false")


def check_tied(origin: str, embedding: Tensor, output: Tensor, remedy: str) -> None:
    """Compare the output layer that a model stores with the embedding that is said to be the same.

    Raises:
        CheckpointError: they differ, so that leaving one out would make another model.
    """
    if not torch.equal(embedding, output):
        raise CheckpointError(
            f"{origin} stores an output layer that differs from the embedding, but its config calls the two tied; "
            f"if the output layer is right, say {remedy} in the config"
        )


def raise_if_any(
    origin: str, *, missing: Iterable[str], unexpected: Iterable[str], wrong_shapes: Iterable[str], remedy: str
) -> None:
    """One error that lists what does not fit.

    Raises:
        CheckpointError: unless all three are empty.
    """
    problems = [
        f"{len(items)} {kind}: {', '.join(items[:_MOST_NAMED])}{' ...' if len(items) > _MOST_NAMED else ''}"
        for kind, items in (
            ("missing tensors", sorted(missing)),
            ("unexpected tensors", sorted(unexpected)),
            ("tensors of the wrong shape", sorted(wrong_shapes)),
        )
        if items
    ]
    if problems:
        first, *details = (
            printable(line, 10_000) for line in (f"{origin} does not fit the model; {remedy}", *problems)
        )
        raise CheckpointError(Lines("\n  ".join([first, *details])))


class RandomSource(TensorSource):
    """Random start weights as megatron-core draws them: normal with ``initializer_range``, norms one, biases zero.

    Attention and MLP output projections have their deviation divided by ``sqrt(2 * num_layers)``. Every tensor
    has a generator of its own, seeded by a hash of ``seed`` and its name, so the weights depend neither on the
    parallel layout nor on the order in which they are asked for.
    """

    def __init__(self, architecture: Architecture, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(f"random weights (seed {seed})", hf_shapes(architecture))
        self._architecture = architecture
        self._seed = seed
        self._dtype = dtype

    def dtype(self, name: str) -> torch.dtype:
        """The one that they are drawn for."""
        return self._dtype

    def get(self, name: str) -> Tensor:
        """Drawn anew each time."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, dtype=self._dtype)
        std = self._architecture.initializer_range
        if name.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight")):
            std /= math.sqrt(2 * self._architecture.num_layers)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.empty(shape).normal_(0.0, std, generator=generator).to(self._dtype)


def get_fitting(source: TensorSource, name: str, target: torch.dtype) -> Tensor:
    """The tensor in its own dtype, all of whose numbers are finite and fit ``target``.

    Raises:
        CheckpointError: one is not or does not.
    """
    tensor, limit = source.get(name), torch.finfo(target).max
    largest = max(abs(bound.item()) for bound in tensor.aminmax()) if tensor.numel() else 0.0
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{source.origin}: {name} holds NaN or infinity, so nothing is written; give a model with finite weights"
        )
    if largest > limit:
        raise CheckpointError(
            f"{source.origin}: {name} holds {largest:g}, more than {limit:g}, the largest number of "
            f"{str(target).removeprefix('torch.')}; convert with --dtype bf16 or fp32"
        )
    return tensor

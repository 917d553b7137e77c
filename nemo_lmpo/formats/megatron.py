"""A distributed checkpoint as a source of Hugging Face tensors."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
from nemo_lmpo.formats.fields import LARGEST_SIZE
from nemo_lmpo.formats.mapping import (
    EMBEDDING,
    LAYERS,
    OUTPUT_LAYER,
    Rule,
    TensorLayout,
    hf_shapes,
    megatron_shape,
    rules_by_layer,
    separate,
)
from nemo_lmpo.formats.source import TensorSource, check_tied, raise_if_any

_PREFIX = re.compile(rf"((?:model\.|module\.)*){re.escape(EMBEDDING)}")
_MOST_PADDING = 128 * 64
"""Rows are padded to 128 times the tensor-parallel size, and no model is split over more than 64 GPUs."""
_NOT_WEIGHTS = re.compile(r"_extra_state|rotary_pos_emb\.inv_freq$")


def find_prefix(checkpoint: DistributedCheckpoint) -> str:
    """What stands before `embedding.word_embeddings.weight` (`model.`, `module.` or nothing).

    Raises:
        CheckpointError: no such tensor.
    """
    matches = (_PREFIX.fullmatch(key) for key in checkpoint.tensors)
    found = sorted((match[1] for match in matches if match), key=len)
    if not found:
        raise CheckpointError(
            f"{checkpoint.origin} holds no {EMBEDDING}; give the checkpoint of a megatron-core GPT model"
        )
    return found[0]


class MegatronSource(TensorSource):
    """A distributed checkpoint under Hugging Face names.

    Raises:
        CheckpointError: with every tensor that is missing, unexpected or of the wrong shape.
    """

    def __init__(self, checkpoint: DistributedCheckpoint, architecture: Architecture) -> None:
        super().__init__(checkpoint.origin, hf_shapes(architecture))
        self._checkpoint = checkpoint
        self._architecture = architecture
        self._prefix = find_prefix(checkpoint)
        # Where a Hugging Face tensor lies: part of a rule in a layer.
        self._places = {
            name: (rule, layer, part)
            for rule, layer in rules_by_layer(architecture)
            for part, name in enumerate(rule.hf_names(layer))
        }
        self._last: tuple[tuple[str, int | None], tuple[Tensor, ...]] | None = None
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype as stored."""
        rule, layer, _ = self._places[name]
        return self._checkpoint.tensors[self._key(rule, layer)[0]].properties.dtype

    def get(self, name: str) -> Tensor:
        """The tensor, read from the file."""
        rule, layer, part = self._places[name]
        key, index = self._key(rule, layer)
        # Neighbours (q, k, v; gate, up) come from the same stored tensor and are asked for in turn.
        if self._last is None or self._last[0] != (key, index):
            self._last = None
            self._last = (key, index), separate(rule, self._checkpoint.read(key, index), self._architecture)
        return self._last[1][part]

    def _key(self, rule: Rule, layer: int) -> tuple[str, int | None]:
        """Key of the stored tensor, and the index of the layer in it if layers are stacked."""
        if not rule.per_layer:
            return self._prefix + rule.megatron, None
        stacked = self._prefix + rule.megatron
        if stacked in self._checkpoint.tensors:
            return stacked, layer
        return f"{self._prefix}{LAYERS}{layer}.{rule.megatron.removeprefix(LAYERS)}", None

    def _check(self) -> None:
        stored = self._checkpoint.tensors
        expected: set[str] = set()
        wrong_shapes = []
        for rule, layer in rules_by_layer(self._architecture):
            key, index = self._key(rule, layer)
            shape = megatron_shape(rule, self._architecture)
            whole = shape if index is None else (self._architecture.num_layers, *shape)
            if key in stored and key not in expected and not _fits(tuple(stored[key].size), whole, rule):
                wrong_shapes.append(f"{key} is {list(stored[key].size)} instead of {list(whole)}")
            expected.add(key)
        own = {key for key in stored if key.startswith((self._prefix + "embedding.", self._prefix + "decoder."))}
        raise_if_any(
            self.origin,
            missing=expected - stored.keys(),
            unexpected={key for key in own if not _NOT_WEIGHTS.search(key)} - expected,
            wrong_shapes=wrong_shapes,
            remedy="give the config that belongs to the weights",
        )
        odd = sorted(key for key in expected if not stored[key].properties.dtype.is_floating_point)
        if odd:
            raise CheckpointError(
                f"{self.origin}: {odd[0]} is stored as {stored[odd[0]].properties.dtype}, which is not "
                "supported; save the weights as floating-point numbers"
            )
        self._check_output_layer()

    def _check_output_layer(self) -> None:
        """A tied model may store a copy of its embedding, never another output layer; only padding is cut off."""
        rows = stored_rows(self._checkpoint)
        vocabulary = self._architecture.vocab_size
        if rows - vocabulary >= _MOST_PADDING:
            raise CheckpointError(
                f"{self.origin} holds {rows} rows of vocabulary, more than padding of a vocabulary of "
                f"{vocabulary} explains; give the config that belongs to the weights"
            )
        output = self._prefix + OUTPUT_LAYER
        if self._architecture.tie_word_embeddings and output in self._checkpoint.tensors:
            embedding, head = (self._checkpoint.read(key) for key in (self._prefix + EMBEDDING, output))
            check_tied(self.origin, embedding, head, "that they are not tied")


def _fits(size: tuple[int, ...], expected: tuple[int, ...], rule: Rule) -> bool:
    if rule.layout is TensorLayout.VOCABULARY:
        return len(size) == 2 and size[0] >= expected[0] and size[1] == expected[1]
    return size == expected


def stored_rows(checkpoint: DistributedCheckpoint) -> int:
    """Vocabulary rows of the embedding as stored, padding included.

    Raises:
        CheckpointError: it is not a matrix, or larger than any.
    """
    size = checkpoint.tensors[find_prefix(checkpoint) + EMBEDDING].size
    if len(size) != 2 or not 0 < size[0] <= LARGEST_SIZE:
        raise CheckpointError(
            f"{checkpoint.origin}: the embedding has the shape {list(size)}; copy the checkpoint again"
        )
    return int(size[0])

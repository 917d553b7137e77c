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
    LOCAL_SPEC_NAMES,
    MIXTURE_NORM,
    OUTPUT_LAYER,
    Place,
    Rule,
    TensorLayout,
    hf_shapes,
    megatron_shape,
    rules_by_place,
    separate,
    stacked,
)
from nemo_lmpo.formats.source import TensorSource, check_tied, raise_if_any

_PREFIX = re.compile(rf"((?:model\.|module\.)*){re.escape(EMBEDDING)}")
_MOST_PADDING = 128 * 64
"""Rows are padded to 128 times the tensor-parallel size, and no model is split over more than 64 GPUs."""
_SINGLETON = re.compile(r"\.weight_[wv]")
"""Gate and up projection by themselves, where megatron-core saves with `singleton_local_shards`."""
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
        # Where a Hugging Face tensor lies: part of a rule in a layer, and of an expert of it.
        self._places = {
            name: (rule, place, part)
            for rule, place in rules_by_place(architecture)
            for part, name in enumerate(rule.hf_names(place))
        }
        self._near: tuple[Place, dict[str, tuple[Tensor, ...]]] | None = None
        """What was read of one layer, or of one expert, by key."""
        self._check()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype as stored."""
        rule, place, _ = self._places[name]
        return self._checkpoint.tensors[self._key(rule, place)[0]].properties.dtype

    def get(self, name: str) -> Tensor:
        """The tensor, read from the file."""
        rule, place, part = self._places[name]
        key, index = self._key(rule, place)
        # Neighbours (q, k, v; gate, up) come from the same stored tensor; others of the layer are asked for between.
        if self._near is None or self._near[0] != place:
            self._near = None
            self._near = place, {}
        read = self._near[1]
        if key not in read:
            read[key] = separate(rule, self._checkpoint.read(key, index), self._architecture)
        return read[key][part]

    def _key(self, rule: Rule, place: Place) -> tuple[str, tuple[int, ...]]:
        """Key of the stored tensor, and the place on the axes over which layers and experts are stacked in it."""
        index = rule.index(place)
        if not rule.per_layer:
            return self._prefix + rule.megatron, index
        for name in self._names(rule):
            if self._prefix + name in self._checkpoint.tensors:
                return self._prefix + name, index
        rest = rule.megatron.removeprefix(LAYERS)
        return f"{self._prefix}{LAYERS}{place.layer}.{rest}", index[1:]

    def _names(self, rule: Rule) -> tuple[str, ...]:
        """A mixture's norm is stored under a dense model's name by megatron-core's local layers."""
        other = LOCAL_SPEC_NAMES[MIXTURE_NORM]
        return (rule.megatron, LAYERS + other) if rule.megatron == LAYERS + MIXTURE_NORM else (rule.megatron,)

    def _check(self) -> None:
        stored = self._checkpoint.tensors
        if singletons := sorted(key for key in stored if _SINGLETON.search(key)):
            raise CheckpointError(
                f"{self.origin} was saved with megatron-core's singleton_local_shards ({singletons[0]}), which is not "
                f"supported; load it with megatron-core and save it without"
            )
        expected: set[str] = set()
        wrong_shapes = []
        for rule, place in rules_by_place(self._architecture):
            key, index = self._key(rule, place)
            lead = stacked(rule, self._architecture)
            whole = (*lead[len(lead) - len(index) :], *megatron_shape(rule, self._architecture))
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

"""A model with tokens that its weights do not know yet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_lmpo.formats.mapping import HF_EMBEDDING, HF_OUTPUT
from nemo_lmpo.formats.source import TensorSource


class GrownSource(TensorSource):
    """Another source whose embedding and output layer have rows for new tokens: the mean of all rows of old ones.

    The mean is what the model expects of an unknown token, and keeps what it says of the known ones: a new token gets
    about the mean logit, so the softmax of a vocabulary of tens of thousands hardly changes.
    """

    def __init__(self, source: TensorSource, vocab_size: int, added_ids: Sequence[int]) -> None:
        self._source = source
        self._added = list(added_ids)
        self._vocab_size = vocab_size
        shapes = {name: tuple(source.shape(name)) for name in source.names()}
        shapes |= {name: (vocab_size, *shapes[name][1:]) for name in (HF_EMBEDDING, HF_OUTPUT) if name in shapes}
        super().__init__(source.origin, shapes)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype, without reading the tensor."""
        return self._source.dtype(name)

    def get(self, name: str) -> Tensor:
        """The tensor; of a layer with a row for each token, with the new rows."""
        found = self._source.get(name)
        if name not in (HF_EMBEDDING, HF_OUTPUT):
            return found
        grown = found.new_zeros(self._vocab_size, *found.shape[1:])
        grown[: len(found)] = found
        old = torch.ones(len(found), dtype=torch.bool)
        old[[token for token in self._added if token < len(found)]] = False
        grown[self._added] = found[old].double().mean(dim=0).to(found.dtype)
        return grown

"""Prompts with answers of other examples, on which KTO estimates how far the policy is from its reference.

An answer that was written for another prompt tells how the policy's distribution moved as a whole, without what the
loss itself does to the answers that it is given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nemo_lmpo.data.example import ANSWERS, Example

if TYPE_CHECKING:
    from nemo_lmpo.data.preference import PreferenceDataset


def partners(order: np.ndarray, batch_size: int) -> np.ndarray:
    """For each example the one whose answer is laid behind its prompt, ``[N]`` int32.

    The answers of a batch are passed on among its prompts: each gets that of the example before it, the first that of
    the last. So an epoch in this order has the mismatched answers of KTO and of TRL's trainer, where one device
    computes the batch.

    Args:
        order: all examples, in an order in which every ``batch_size`` of them make a batch. What is left at the end
            belongs to the last batch.
        batch_size: examples of a batch; of batches of one, which have no other answer, all together count as one.
    """
    whole = len(order) // batch_size if batch_size > 1 else 1
    found = np.empty(len(order), dtype=np.int32)
    for batch in np.split(order, [number * batch_size for number in range(1, whole)]):
        found[batch] = np.roll(batch, 1)
    return found


class MismatchedLengths:
    """As :class:`~nemo_lmpo.data.epoch.Lengths`."""

    def __init__(self, answers: MismatchedAnswers) -> None:
        self._answers = answers

    def __getitem__(self, indices: int | slice | np.ndarray | Sequence[int]) -> np.ndarray:
        of = self._answers
        found = np.array(of.dataset.lengths[indices])
        others = of.dataset.lengths[of.partners[indices]]
        found[..., 1] = np.minimum(others[..., 1], of.longest + 1 - found[..., 0])
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.int64)


class MismatchedAnswers:
    """A dataset's prompts, each with the answer of another example; index by index.

    The label is that of the prompt's own example.
    """

    kind = ANSWERS
    num_responses = 1
    mismatched = None

    def __init__(self, dataset: PreferenceDataset, found: np.ndarray, *, max_length: int, row_tokens: int) -> None:
        """Pair prompts with answers.

        Args:
            dataset: of answers.
            found: as :func:`partners` gives it.
            max_length: maximum number of tokens of prompt and answer; a longer answer loses its end.
            row_tokens: maximum number of tokens of a row. An answer's last token is not fed.
        """
        self.dataset, self.partners = dataset, found
        self.longest = min(max_length - 1, row_tokens)
        """Maximum number of tokens of prompt and answer that are fed."""
        self.lengths = MismatchedLengths(self)
        self._reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.partners)

    def __getitem__(self, index: int) -> Example:
        own = self.dataset[index]
        (answer,) = self.dataset[int(self.partners[index])].responses
        room = self.longest + 1 - len(own.prompt_ids)
        logp = None if self._reference is None else float(self._reference[index, 0])
        return replace(own, responses=(replace(answer, ids=answer.ids[:room], reference_logp=logp),))

    @property
    def fingerprint(self) -> str:
        """Changes whenever any prompt's or answer's tokens would."""
        pairing = hashlib.sha256(self.partners.tobytes()).hexdigest()
        content = [self.dataset.fingerprint, "mismatched", pairing, self.longest]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def attach_reference(self, logps: np.ndarray) -> None:
        """Give every answer its log-probability behind this prompt under a reference model, ``[N, 1]``."""
        assert logps.shape == (len(self), 1)
        self._reference = logps.astype(np.float32)

"""Which pairs make which step: a function of seed, epoch and step alone, so a run can resume anywhere."""

from __future__ import annotations

import numpy as np

from nemo_lmpo.errors import ConfigError, DataError


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, ``[num_examples]`` int32 (int64 beyond 2^31), the same on all machines and versions.

    numpy promises stable bit streams but not a stable ``Generator.permutation``; so the raw bits are sorted.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_examples)
    order = np.argsort(keys, kind="stable")
    return order.astype(np.int32) if num_examples <= np.iinfo(np.int32).max else order


class PairSampler:
    """Hands out the dataset indices of each optimizer step.

    Every epoch is a new permutation of all pairs; the remainder that fills no whole batch is left out, other
    pairs each epoch.

    Args:
        num_examples: pairs in the dataset.
        global_batch_size: pairs of one step.
        seed: `model.seed`, at least 0.

    Raises:
        ConfigError: fewer pairs than one step needs, or a size below 1.
    """

    def __init__(self, num_examples: int, global_batch_size: int, seed: int) -> None:
        if global_batch_size < 1:
            raise ConfigError(f"model.global_batch_size={global_batch_size} must be at least 1")
        if seed < 0:
            raise ConfigError(f"model.seed={seed} must not be negative")
        if num_examples < global_batch_size:
            raise ConfigError(
                f"model.global_batch_size={global_batch_size} is larger than the {num_examples} training pairs; "
                f"set it to at most {num_examples} or add data"
            )
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int32)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the pairs."""
        return self.num_examples // self.global_batch_size

    def pairs_of_step(self, step: int) -> np.ndarray:
        """Dataset indices of step ``step`` (counted from 0 over all epochs), ``[global_batch_size]`` int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = epoch_order(self.num_examples, self.seed, epoch), epoch
        return self._order[batch * self.global_batch_size : (batch + 1) * self.global_batch_size].astype(np.int64)


def validation_steps(num_examples: int, global_batch_size: int) -> list[np.ndarray]:
    """Dataset indices of each validation batch: every pair once, in the data's order; the last batch may be smaller.

    Raises:
        DataError: no pairs.
    """
    if num_examples < 1:
        raise DataError("the validation set holds no pairs; set data.validation.path to a set that does, or unset it")
    return [
        np.arange(start, min(start + global_batch_size, num_examples))
        for start in range(0, num_examples, global_batch_size)
    ]

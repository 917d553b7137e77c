import numpy as np
import pytest

from nemo_lmpo.data.order import PairSampler, epoch_order, validation_steps
from nemo_lmpo.errors import ConfigError, DataError


def test_order_is_the_one_the_bit_stream_defines() -> None:
    # PCG64's raw bits are what numpy keeps stable across versions and machines
    bits = [int(bit) for bit in np.random.PCG64(np.random.SeedSequence([42, 3])).random_raw(5)]
    assert epoch_order(5, 42, 3).tolist() == sorted(range(5), key=bits.__getitem__)
    # written down once: a change of these numbers would change every user's run
    assert epoch_order(8, 42, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]
    assert epoch_order(8, 42, 1).tolist() != epoch_order(8, 42, 0).tolist()
    assert epoch_order(8, 43, 0).tolist() != epoch_order(8, 42, 0).tolist()


def test_each_epoch_is_a_permutation_with_another_remainder_left_out() -> None:
    sampler = PairSampler(23, 5, seed=1)
    assert sampler.steps_per_epoch == 4
    left_out = []
    for epoch in range(4):
        seen = np.concatenate([sampler.pairs_of_step(4 * epoch + i) for i in range(4)]).tolist()
        assert len(seen) == len(set(seen)) == 20
        left_out.append(set(range(23)) - set(seen))
    assert len({frozenset(pairs) for pairs in left_out}) > 1


def test_a_step_depends_on_nothing_asked_before() -> None:
    forward = PairSampler(40, 8, seed=7)
    in_order = [forward.pairs_of_step(step).tolist() for step in range(15)]
    for step in (14, 3, 9, 0):
        assert PairSampler(40, 8, seed=7).pairs_of_step(step).tolist() == in_order[step]
        assert forward.pairs_of_step(step).tolist() == in_order[step]


def test_changing_a_returned_step_changes_nothing_else() -> None:
    sampler = PairSampler(8, 4, seed=0)
    first = sampler.pairs_of_step(0)
    kept = first.tolist()
    first[:] = -1
    assert sampler.pairs_of_step(0).tolist() == kept


def test_too_few_pairs_and_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"model.global_batch_size=8 .* 7 training pairs"):
        PairSampler(7, 8, seed=0)
    with pytest.raises(ConfigError, match=r"model.global_batch_size=0"):
        PairSampler(7, 0, seed=0)
    with pytest.raises(ConfigError, match=r"model.seed=-1"):
        PairSampler(7, 1, seed=-1)


def test_validation_covers_every_pair_in_order() -> None:
    assert [batch.tolist() for batch in validation_steps(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.tolist() for batch in validation_steps(2, 3)] == [[0, 1]]
    with pytest.raises(DataError, match="validation set holds no pairs"):
        validation_steps(0, 3)

"""Running statistics by hand arithmetic over several steps."""

from __future__ import annotations

import json
import math
import random
import statistics as stdlib_statistics
from typing import Any

import pytest
import torch

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.loss.interface import Statistics, StatisticsConfig
from nemo_lmpo.loss.running_statistics import RunningStatistics

EMA = StatisticsConfig(kind="ema", update="after_step")
RELEASED = StatisticsConfig(kind="ema", update="before_step", bias_correction=False, in_evaluation=True, group_size=2)
CUMULATIVE = StatisticsConfig(kind="cumulative", update="after_step")
BATCH_MEAN = StatisticsConfig(kind="batch_mean", update="before_step")


def about(mean: float, std: float, count: int) -> Statistics:
    """What equals statistics that are nearly these."""
    near_mean: Any = pytest.approx(mean)
    near_std: Any = pytest.approx(std)
    return Statistics(near_mean, near_std, count)


def updated(config: StatisticsConfig, *batches: list[float]) -> RunningStatistics:
    running = RunningStatistics(config)
    for batch in batches:
        running.update(torch.tensor(batch))
    return running


def test_nothing_is_known_at_first() -> None:
    for config in (EMA, RELEASED, CUMULATIVE, BATCH_MEAN):
        assert RunningStatistics(config).current().count == 0


def test_ema_with_bias_correction_over_three_steps() -> None:
    # means 2, 5, 1; sample deviations sqrt(2), sqrt(8), 0.
    running = RunningStatistics(EMA)
    running.update(torch.tensor([1.0, 3.0]))
    assert running.current() == about(2.0, math.sqrt(2), 1)
    running.update(torch.tensor([3.0, 7.0]))
    # mean: (0.9 * 0.2 + 0.1 * 5) / (1 - 0.81) = 0.68 / 0.19
    # std: (0.09 * sqrt 2 + 0.1 * sqrt 8) / 0.19 = 0.29 sqrt(2) / 0.19
    assert running.current() == about(0.68 / 0.19, 0.29 * math.sqrt(2) / 0.19, 2)
    running.update(torch.tensor([1.0, 1.0, 1.0]))
    # mean: (0.9 * 0.68 + 0.1) / (1 - 0.729) = 0.712 / 0.271; std: 0.9 * 0.29 sqrt(2) / 0.271
    assert running.current() == about(0.712 / 0.271, 0.261 * math.sqrt(2) / 0.271, 3)


def test_one_value_moves_the_mean_only() -> None:
    running = updated(EMA, [1.0, 3.0], [12.0])
    # mean: (0.9 * 0.2 + 0.1 * 12) / 0.19 = 1.38 / 0.19; the deviation still rests on one update, corrected by 0.1.
    assert running.current() == about(1.38 / 0.19, math.sqrt(2), 1)
    running.update(torch.tensor([0.0, 2.0]))
    # mean: (0.9 * 1.38 + 0.1) / 0.271; std: (0.09 + 0.1) sqrt(2) / 0.19 = sqrt(2), with its own count of two
    assert running.current() == about(1.342 / 0.271, math.sqrt(2), 2)


def test_only_single_values_give_no_deviation() -> None:
    running = updated(EMA, [1.0], [2.0])
    assert running.current().count == 0
    assert running.current().mean == pytest.approx((0.9 * 0.1 + 0.1 * 2) / 0.19)


def test_released_code_starts_at_zero_without_correction() -> None:
    running = updated(RELEASED, [0.2, 0.4])
    # 0.1 * 0.3 and 0.1 * sqrt(0.02)
    assert running.current() == about(0.03, 0.1 * math.sqrt(0.02), 1)
    running.update(torch.tensor([0.6]))
    assert running.current() == about(0.087, 0.1 * math.sqrt(0.02), 1)


def test_momentum_zero_is_the_last_batch() -> None:
    running = updated(StatisticsConfig("ema", "after_step", momentum=0.0), [0.0, 9.0], [1.0, 3.0])
    assert running.current() == about(2.0, math.sqrt(2), 2)


def test_deviation_is_floored() -> None:
    config = StatisticsConfig("ema", "after_step", eps=1e-3)
    assert updated(config, [0.5, 0.5]).current().std == 1e-3
    cumulative = StatisticsConfig("cumulative", "after_step", eps=1e-3)
    assert updated(cumulative, [0.5, 0.5]).current().std == 1e-3


def test_cumulative_equals_all_values_at_once() -> None:
    generator = random.Random(3)
    batches = [[generator.gauss(5.0, 0.01) for _ in range(size)] for size in (1, 2, 1, 7, 30)]
    running = RunningStatistics(CUMULATIVE)
    seen: list[float] = []
    for batch in batches:
        running.update(torch.tensor(batch, dtype=torch.float64))
        seen += batch
        if len(seen) == 1:
            assert running.current().count == 0
            continue
        current = running.current()
        assert current.count == len(seen)
        assert current.mean == pytest.approx(stdlib_statistics.fmean(seen), rel=1e-13)
        assert current.std == pytest.approx(stdlib_statistics.stdev(seen), rel=1e-10)


def test_cumulative_does_not_depend_on_how_values_are_grouped() -> None:
    values = torch.linspace(0.1, 0.9, 24, dtype=torch.float64)
    whole, parts = RunningStatistics(CUMULATIVE), RunningStatistics(CUMULATIVE)
    whole.update(values)
    for part in values.split(5):
        parts.update(part)
    assert parts.current().mean == pytest.approx(whole.current().mean, rel=1e-14)
    assert parts.current().std == pytest.approx(whole.current().std, rel=1e-13)


class TestGroups:
    """A global batch before its losses: every pair sees the statistics after its own group."""

    def test_by_hand(self) -> None:
        # Means 0.3, 0.6, 1; deviations sqrt(0.02), sqrt(0.02) and none for the last pair alone.
        running = RunningStatistics(RELEASED)
        found: Any = running.update_in_groups(torch.tensor([0.2, 0.4, 0.5, 0.7, 1.0], dtype=torch.float64))
        first, second = 0.1 * math.sqrt(0.02), 0.19 * math.sqrt(0.02)
        assert found.mean.tolist() == pytest.approx([0.03, 0.03, 0.087, 0.087, 0.1783])
        assert found.std.tolist() == pytest.approx([first, first, second, second, second])
        assert found.count.tolist() == [1, 1, 2, 2, 2]
        assert running.current() == about(0.1783, second, 2)

    def test_evaluation_has_groups_of_its_own(self) -> None:
        config = StatisticsConfig("ema", "before_step", group_size=2, evaluation_group_size=4)
        values = torch.tensor([0.1, 0.2, 0.6, 0.9], dtype=torch.float64)
        found: Any = RunningStatistics(config).update_in_groups(values, evaluation=True)
        assert found.mean.tolist() == pytest.approx([0.45] * 4)
        trained: Any = RunningStatistics(config).update_in_groups(values)
        assert trained.mean[0] == pytest.approx(0.15)

    def test_without_a_size_the_batch_is_one_group(self) -> None:
        found: Any = RunningStatistics(BATCH_MEAN).update_in_groups(torch.tensor([1.0, 2.0, 6.0]))
        assert (found.mean.tolist(), found.count.tolist()) == ([3.0] * 3, [3] * 3)

    def test_no_pairs_change_nothing(self) -> None:
        running = updated(RELEASED, [1.0, 3.0])
        before = running.state_dict()
        nothing: Any = running.update_in_groups(torch.empty(0))
        assert nothing.mean.numel() == 0
        assert running.state_dict() == before

    def test_pairs_pick_their_own(self) -> None:
        found: Any = Statistics(torch.tensor([1.0, 2.0, 3.0]), 0.5, torch.tensor([1, 1, 2])).of_pairs(
            torch.tensor([2, 0])
        )
        assert (found.mean.tolist(), found.std, found.count.tolist()) == ([3.0, 1.0], 0.5, [2, 1])


def test_batch_mean_forgets() -> None:
    running = updated(BATCH_MEAN, [1.0, 5.0], [-2.0, -4.0, -6.0])
    assert running.current() == Statistics(-4.0, 1.0, 3)


def test_an_empty_batch_changes_nothing() -> None:
    for config in (EMA, CUMULATIVE, BATCH_MEAN):
        running = updated(config, [1.0, 3.0])
        before = running.state_dict()
        running.update(torch.empty(0))
        assert running.state_dict() == before


def test_float32_values_are_averaged_in_float64() -> None:
    # 1 + 2^-24 is not a float32: a float32 mean of 1 and the next float32 would round.
    values = torch.tensor([1.0, 1.0 + 2**-23], dtype=torch.float32)
    running = RunningStatistics(CUMULATIVE)
    running.update(values)
    assert running.current().mean == 1.0 + 2**-24


@pytest.mark.parametrize("config", [EMA, RELEASED, CUMULATIVE, BATCH_MEAN])
def test_state_survives_json_and_goes_on_bit_for_bit(config: StatisticsConfig) -> None:
    running = updated(config, [0.1, 0.7], [0.3], [0.2, 0.9, 0.4])
    restored = RunningStatistics(config)
    restored.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert restored.current() == running.current()
    for one in (running, restored):
        one.update(torch.tensor([0.15, 0.35]))
    assert restored.state_dict() == running.state_dict()
    assert restored.current() == running.current()


def test_state_of_another_kind_or_damaged_is_refused() -> None:
    state = updated(EMA, [1.0, 2.0]).state_dict()
    with pytest.raises(CheckpointError, match=r"kind 'ema'.*'cumulative'"):
        RunningStatistics(CUMULATIVE).load_state_dict(state)
    for damaged in ({**state, "mean": "x"}, {k: v for k, v in state.items() if k != "spread"}):
        with pytest.raises(CheckpointError, match="damaged"):
            RunningStatistics(EMA).load_state_dict(damaged)


def test_unknown_kind_and_update_are_refused() -> None:
    with pytest.raises(ValueError, match=r"statistics\.kind='median'"):
        RunningStatistics(StatisticsConfig("median", "after_step"))
    with pytest.raises(ValueError, match=r"statistics\.update='never'"):
        RunningStatistics(StatisticsConfig("ema", "never"))

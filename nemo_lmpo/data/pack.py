"""Pairs laid behind each other in rows: who gets which pair, and what a row looks like.

Packing decides cost only: the pairs of a step, their tokens and so the loss are the same for every plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from nemo_lmpo.data.balance import even_out
from nemo_lmpo.data.pair import PackedSequence, PairTokens
from nemo_lmpo.errors import ConfigError, DataError

RowPlan = list[list[list[int]]]
"""For each data-parallel rank its rows, for each row the positions of its pairs in the global batch."""


def pair_tokens(lengths: np.ndarray, share_prompt: bool) -> np.ndarray:
    """Row tokens that each pair takes, ``[B]``, from ``lengths`` ``[B, 3]`` (prompt, chosen, rejected).

    The last token of a response is only ever a target, so it is not fed.
    """
    prompts = lengths[:, 0] * (1 if share_prompt else 2)
    tokens: np.ndarray = prompts + lengths[:, 1] + lengths[:, 2] - 2
    return tokens


def plan_micro_batches(
    lengths: np.ndarray,
    *,
    dp_size: int,
    row_tokens: int,
    max_pairs_per_row: int | None,
    share_prompt: bool,
    multiple_of_rows: int = 1,
) -> RowPlan:
    """Lay the pairs of a global batch into rows, the same number for every data-parallel rank.

    Takes the smallest number of rows for which placing the longest pairs first, each into the emptiest row,
    stays within the budget; so rows and ranks are balanced by tokens. The result depends on the arguments only,
    so every rank computes the same plan without talking to the others.

    Args:
        lengths: ``[B, 3]`` tokens of prompt, chosen and rejected.
        dp_size: data-parallel ranks.
        row_tokens: maximum number of tokens of a row (before it is padded to a multiple).
        max_pairs_per_row: most pairs of a row; None: as many as fit.
        share_prompt: whether the prompt stands in the row once.
        multiple_of_rows: the rows of a rank are a multiple of this (interleaved pipeline schedule).

    Returns:
        For each rank its rows, longest first, each a list of positions in ``0..B-1``; together every position
        once. Rows are empty where there are fewer pairs than rows.

    Raises:
        DataError: a single pair is longer than the budget.
    """
    if max_pairs_per_row is not None and max_pairs_per_row < 1:
        raise ConfigError(f"model.micro_batch_size={max_pairs_per_row} must be at least 1; unset it for no limit")
    costs = pair_tokens(np.asarray(lengths, dtype=np.int64).reshape(-1, 3), share_prompt)
    _check_budget(costs, row_tokens)
    limit = len(costs) if max_pairs_per_row is None else max_pairs_per_row
    block = dp_size * multiple_of_rows
    least = max(-(-int(costs.sum()) // row_tokens), -(-len(costs) // max(limit, 1)), 1)
    tried = (_fill_rows(costs, number, row_tokens, limit) for number in count(-(-least // block) * block, block))
    rows = next(filter(None, tried))
    even_out(rows, costs)
    return _deal_rows(rows, costs, dp_size)


def _check_budget(costs: np.ndarray, row_tokens: int) -> None:
    too_long = np.flatnonzero(costs > row_tokens)
    if len(too_long):
        position = int(too_long[0])
        raise DataError(
            f"pair {position} of the batch takes {int(costs[position])} tokens, more than "
            f"data.row_tokens={row_tokens}; raise data.row_tokens or lower data.max_length"
        )


def _fill_rows(costs: np.ndarray, num_rows: int, row_tokens: int, limit: int) -> list[list[int]] | None:
    """Longest pair first into the emptiest row that has room; None if a pair finds none."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = np.zeros(num_rows, dtype=np.int64)
    full = np.iinfo(np.int64).max
    for position in np.argsort(-costs, kind="stable").tolist():
        emptiest = int(np.argmin(loads))
        if loads[emptiest] == full:
            return None
        used = int(loads[emptiest]) + int(costs[position])
        if used > row_tokens:
            return None
        rows[emptiest].append(position)
        loads[emptiest] = used if len(rows[emptiest]) < limit else full
    return rows


def _deal_rows(rows: list[list[int]], costs: np.ndarray, dp_size: int) -> RowPlan:
    """Longest row first to the rank with the fewest tokens that still needs rows."""
    per_rank = len(rows) // dp_size
    plan: RowPlan = [[] for _ in range(dp_size)]
    tokens = [0] * dp_size
    for row in sorted(rows, key=lambda row: -int(costs[row].sum())):
        open_ranks = [rank for rank in range(dp_size) if len(plan[rank]) < per_rank]
        rank = min(open_ranks, key=lambda rank: (tokens[rank], rank))
        plan[rank].append(sorted(row))
        tokens[rank] += int(costs[row].sum())
    return plan


def imbalance(plan: RowPlan, lengths: np.ndarray, *, share_prompt: bool) -> float:
    """Tokens of the busiest data-parallel rank over the mean of all ranks; 1.0 is perfect balance."""
    costs = pair_tokens(np.asarray(lengths, dtype=np.int64).reshape(-1, 3), share_prompt)
    tokens = [sum(int(costs[row].sum()) for row in rank) for rank in plan]
    return max(tokens) / max(sum(tokens) / len(tokens), 1.0)


class _RowBuilder:
    """Collects tokens and layout while segments are appended."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.predict_positions: list[int] = []
        self.targets: list[int] = []
        self.sequences: list[int] = []

    def add_segment(self, ids: Sequence[int], prefix: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Append ``ids`` behind what is there; returns (start, length). Nothing is added for no ids."""
        start = len(self.ids)
        if ids:
            self.ids.extend(ids)
            self.positions.extend(range(prefix[1], prefix[1] + len(ids)))
            self.segments.append((start, len(ids), *prefix))
        return start, len(ids)

    def add_targets(self, response: list[int], first_from: int, rest_from: int, sequence: int) -> None:
        """Predict ``response[0]`` at row position ``first_from`` and the others from ``rest_from`` on."""
        self.predict_positions.append(first_from)
        self.predict_positions.extend(range(rest_from, rest_from + len(response) - 1))
        self.targets.extend(response)
        self.sequences.extend([sequence] * len(response))

    def add_pair(self, pair: PairTokens, index: int, *, share_prompt: bool) -> None:
        """Three segments, prompt, chosen and rejected, where both responses see the prompt; or two, with it in each."""
        prompt = self.add_segment(pair.prompt_ids) if share_prompt else (0, 0)
        own = [] if share_prompt else pair.prompt_ids
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            start = self.add_segment([*own, *response[:-1]], prefix=prompt)[0] + len(own)
            last_of_prompt = (start if own else sum(prompt)) - 1
            self.add_targets(response, last_of_prompt, start, 2 * index + side)

    def pad(self, multiple: int, pad_id: int) -> None:
        """Fill up to a multiple (one whole multiple for an empty row) with one segment that predicts nothing."""
        missing = -len(self.ids) % multiple if self.ids else multiple
        self.add_segment([pad_id] * missing)


def pack_pairs(
    pairs: Sequence[PairTokens],
    pair_index: Sequence[int],
    *,
    share_prompt: bool,
    pad_to_multiple: int = 1,
    pad_id: int = 0,
) -> PackedSequence:
    """Lay pairs into one row.

    The first token of a response is predicted from the prompt's last position, for both responses; each other
    one from the response token before it. The last token of a response is a target but not an input.

    Args:
        pairs: the row's pairs, each with at least one token of prompt and of both responses; none for an empty row.
        pair_index: their places in the global batch.
        share_prompt: the prompt once (three segments a pair) or twice (two segments a pair).
        pad_to_multiple: the row's length becomes a multiple of this.
        pad_id: token of the padding; no real token sees it and it predicts nothing.

    Returns:
        The row, on the CPU. ``reference_logps`` is set when every pair has its reference log-probabilities.
    """
    assert len(pairs) == len(pair_index)
    builder = _RowBuilder()
    for index, pair in enumerate(pairs):
        assert all((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)), pair.pair_id
        builder.add_pair(pair, index, share_prompt=share_prompt)
    builder.pad(pad_to_multiple, pad_id)
    lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return PackedSequence(
        input_ids=torch.tensor([builder.ids], dtype=torch.int64),
        position_ids=torch.tensor([builder.positions], dtype=torch.int64),
        segments=torch.tensor(builder.segments, dtype=torch.int32).reshape(-1, 4),
        predict_positions=torch.tensor(builder.predict_positions, dtype=torch.int64),
        target_ids=torch.tensor(builder.targets, dtype=torch.int64),
        sequence_index=torch.tensor(builder.sequences, dtype=torch.int64),
        pair_index=torch.tensor(list(pair_index), dtype=torch.int64),
        response_lengths=torch.tensor(lengths, dtype=torch.float32).reshape(-1, 2),
        reference_logps=_reference_logps(pairs),
    )


def _reference_logps(pairs: Sequence[PairTokens]) -> torch.Tensor | None:
    values = [(pair.reference_chosen_logp, pair.reference_rejected_logp) for pair in pairs]
    if any(chosen is None or rejected is None for chosen, rejected in values):
        return None
    sums = torch.tensor(values, dtype=torch.float32).reshape(-1, 2)
    shared = [pair.reference_shared_logps for pair in pairs if pair.reference_shared_logps is not None]
    if not shared or len(shared) < len(pairs):
        return sums
    return torch.cat([sums, torch.tensor(shared, dtype=torch.float32)], dim=1)

"""Examples laid behind each other in rows: who gets which, and what a row looks like.

Packing decides cost only: the examples of a step, their tokens and so the loss are the same for every plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import torch

from nemo_lmpo.data.balance import even_out
from nemo_lmpo.data.example import Example, PackedSequence, Response
from nemo_lmpo.errors import ConfigError, DataError

RowPlan = list[list[list[int]]]
"""For each data-parallel rank its rows, for each row the positions of its examples in the global batch."""


def example_tokens(lengths: np.ndarray, share_prompt: bool) -> np.ndarray:
    """Row tokens that each example takes, ``[B]``.

    The last token of a response is only ever a target, so it is not fed. A prompt of one response is laid once.

    Args:
        lengths: ``[B, 3]`` tokens of prompt, first response and second one; 0 where an example has no second.
        share_prompt: whether a prompt stands in the row once for both responses.
    """
    responses = (lengths[:, 1:] > 0).sum(axis=1)
    prompts = lengths[:, 0] * (1 if share_prompt else responses)
    tokens: np.ndarray = prompts + lengths[:, 1:].sum(axis=1) - responses
    return tokens


def plan_micro_batches(
    lengths: np.ndarray,
    *,
    dp_size: int,
    row_tokens: int,
    max_examples_per_row: int | None,
    share_prompt: bool,
    multiple_of_rows: int = 1,
) -> RowPlan:
    """Lay the examples of a global batch into rows, the same number for every data-parallel rank.

    Takes the smallest number of rows for which placing the longest ones first, each into the emptiest row,
    stays within the budget; so rows and ranks are balanced by tokens. The result depends on the arguments only,
    so every rank computes the same plan without talking to the others.

    Args:
        lengths: as for :func:`example_tokens`.
        dp_size: data-parallel ranks.
        row_tokens: maximum number of tokens of a row (before it is padded to a multiple).
        max_examples_per_row: most examples of a row; None: as many as fit.
        share_prompt: whether the prompt stands in the row once.
        multiple_of_rows: the rows of a rank are a multiple of this (interleaved pipeline schedule).

    Returns:
        For each rank its rows, longest first, each a list of positions in ``0..B-1``; together every position
        once. Rows are empty where there are fewer examples than rows.

    Raises:
        DataError: a single example is longer than the budget.
    """
    if max_examples_per_row is not None and max_examples_per_row < 1:
        raise ConfigError(f"model.micro_batch_size={max_examples_per_row} must be at least 1; unset it for no limit")
    costs = example_tokens(np.asarray(lengths, dtype=np.int64).reshape(-1, 3), share_prompt)
    _check_budget(costs, row_tokens)
    limit = len(costs) if max_examples_per_row is None else max_examples_per_row
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
    """Longest example first into the emptiest row that has room; None if one finds none."""
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
    costs = example_tokens(np.asarray(lengths, dtype=np.int64).reshape(-1, 3), share_prompt)
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

    def add_targets(self, response: Response, first_from: int, rest_from: int, sequence: int) -> None:
        """Predict the response's first token at row position ``first_from`` and the others from ``rest_from`` on."""
        ids = response.ids
        for start, stop in response.spans or ((0, len(ids)),):
            if start == 0:
                self.predict_positions.append(first_from)
            self.predict_positions.extend(range(rest_from + max(start - 1, 0), rest_from + stop - 1))
            self.targets.extend(ids[start:stop])
            self.sequences.extend([sequence] * (stop - start))

    def add_example(self, example: Example, index: int, *, share_prompt: bool) -> None:
        """Its prompt and then each response, which see it; or, for each response, a segment with the prompt in it."""
        share_prompt = share_prompt and len(example.responses) > 1
        prompt = self.add_segment(example.prompt_ids) if share_prompt else (0, 0)
        own = [] if share_prompt else example.prompt_ids
        for place, response in enumerate(example.responses):
            start = self.add_segment([*own, *response.ids[:-1]], prefix=prompt)[0] + len(own)
            last_of_prompt = (start if own else sum(prompt)) - 1
            self.add_targets(response, last_of_prompt, start, len(example.responses) * index + place)

    def pad(self, multiple: int, pad_id: int) -> None:
        """Fill up to a multiple (one whole multiple for an empty row) with one segment that predicts nothing."""
        missing = -len(self.ids) % multiple if self.ids else multiple
        self.add_segment([pad_id] * missing)


def pack_examples(
    examples: Sequence[Example],
    example_index: Sequence[int],
    *,
    share_prompt: bool,
    responses: int = 2,
    pad_to_multiple: int = 1,
    pad_id: int = 0,
) -> PackedSequence:
    """Lay examples into one row.

    The first token of a response is predicted from the prompt's last position, for each response of an example; each
    other one from the token before it. The last token of a response is a target but not an input.

    Args:
        examples: the row's examples, each with at least one token of prompt and of every response; none for an empty
            row.
        example_index: their places in the global batch.
        share_prompt: the prompt of a pair once (three segments a pair) or twice (two segments a pair).
        responses: responses of each example.
        pad_to_multiple: the row's length becomes a multiple of this.
        pad_id: token of the padding; no real token sees it and it predicts nothing.

    Returns:
        The row, on the CPU. ``reference_logps`` is set when every response has its reference log-probability.
    """
    assert len(examples) == len(example_index)
    builder = _RowBuilder()
    for index, example in enumerate(examples):
        assert example.prompt_ids, example.example_id
        assert len(example.responses) == responses, example.example_id
        assert all(response.predicted for response in example.responses), example.example_id
        builder.add_example(example, index, share_prompt=share_prompt)
    builder.pad(pad_to_multiple, pad_id)
    lengths = [[response.predicted for response in example.responses] for example in examples]
    return PackedSequence(
        input_ids=torch.tensor([builder.ids], dtype=torch.int64),
        position_ids=torch.tensor([builder.positions], dtype=torch.int64),
        segments=torch.tensor(builder.segments, dtype=torch.int32).reshape(-1, 4),
        predict_positions=torch.tensor(builder.predict_positions, dtype=torch.int64),
        target_ids=torch.tensor(builder.targets, dtype=torch.int64),
        sequence_index=torch.tensor(builder.sequences, dtype=torch.int64),
        example_index=torch.tensor(list(example_index), dtype=torch.int64),
        response_lengths=torch.tensor(lengths, dtype=torch.float32).reshape(-1, responses),
        reference_logps=_reference_logps(examples, responses),
        desirable=_desirable(examples),
    )


def _reference_logps(examples: Sequence[Example], responses: int) -> torch.Tensor | None:
    """``[B, responses]``, or twice as many with the sums over common lengths, where all examples have them."""
    sums = [response.reference_logp for example in examples for response in example.responses]
    if any(value is None for value in sums):
        return None
    found = torch.tensor(sums, dtype=torch.float32).reshape(-1, responses)
    shared = [response.reference_shared_logp for example in examples for response in example.responses]
    if not shared or any(value is None for value in shared):
        return found
    return torch.cat([found, torch.tensor(shared, dtype=torch.float32).reshape(-1, responses)], dim=1)


def _desirable(examples: Sequence[Example]) -> torch.Tensor | None:
    said = [example.desirable for example in examples]
    return None if None in said else torch.tensor(said, dtype=torch.bool)

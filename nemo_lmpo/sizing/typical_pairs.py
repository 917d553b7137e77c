"""Pairs of assumed lengths, for programs that plan without data."""

from __future__ import annotations

from dataclasses import replace

from nemo_lmpo.config.schema import Config
from nemo_lmpo.sizing.flops import causal_pairs
from nemo_lmpo.sizing.rank_work import RowSize

TYPICAL = (150, 280, 243)
"""Tokens of prompt, chosen and rejected of UltraFeedback-binarized: from the byte counts of its dataset card at 4.65
characters per token; the rejected answers' share is an assumption."""
LENGTHS = "pairs of {} + {} + {} tokens (prompt, chosen, rejected; UltraFeedback's means)".format(*TYPICAL)


def pair_tokens(lengths: tuple[int, int, int], *, share_prompt: bool) -> int:
    """Tokens that a pair takes in a row; the last token of an answer is only ever a target."""
    prompt, chosen, rejected = lengths
    return prompt * (1 if share_prompt else 2) + chosen + rejected - 2


def pairs_of_a_row(config: Config) -> int:
    """Typical pairs that a micro-batch holds."""
    tokens = pair_tokens(TYPICAL, share_prompt=config.data.share_prompt)
    fitting = max(1, config.data.row_budget // tokens)
    return min(fitting, config.model.micro_batch_size or fitting)


def step_rows(config: Config, data_parallel: int) -> tuple[int, RowSize]:
    """Micro-batches of a replica in a step of typical pairs, and what one of them holds."""
    pairs = config.model.global_batch_size // data_parallel
    rows = -(-pairs // pairs_of_a_row(config))
    if config.model.virtual_pipeline_model_parallel_size is not None:
        stages = config.model.pipeline_model_parallel_size
        rows = -(-rows // stages) * stages
    row = row_of(pairs / rows, share_prompt=config.data.share_prompt)
    if config.model.tp_comm_overlap:
        # Transformer Engine's buffers have one shape, to which every row is padded.
        row = replace(row, tokens=config.data.row_budget)
    return rows, row


def row_of(pairs: float, *, share_prompt: bool) -> RowSize:
    """A micro-batch of so many typical pairs."""
    prompt, chosen, rejected = TYPICAL
    prompts = causal_pairs(prompt) * (1 if share_prompt else 2)
    answers = sum(causal_pairs(length - 1, prefix=prompt) for length in (chosen, rejected))
    return RowSize(
        tokens=round(pairs * pair_tokens(TYPICAL, share_prompt=share_prompt)),
        predicted=round(pairs * (chosen + rejected)),
        attended=round(pairs * (prompts + answers)),
    )


def filling_lengths(config: Config) -> tuple[int, int, int]:
    """Lengths like typical ones, stretched so that :func:`pairs_of_a_row` such pairs fill the row's budget."""
    share = config.data.share_prompt
    wanted = config.data.row_budget // pairs_of_a_row(config)
    typical = pair_tokens(TYPICAL, share_prompt=share)
    prompt, chosen = (max(2, length * wanted // typical) for length in TYPICAL[:2])
    rejected = wanted - pair_tokens((prompt, chosen, 0), share_prompt=share)
    return prompt, chosen, max(rejected, 2)

"""Rows of data of assumed lengths, for programs that plan without data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_lmpo.config.row_fields import CONVERSATION_SCHEMAS
from nemo_lmpo.config.schema import Config
from nemo_lmpo.sizing.flops import causal_pairs
from nemo_lmpo.sizing.rank_work import RowSize
from nemo_lmpo.sizing.row_length import longest_row


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row of data: a pair, or a conversation."""

    prompt: int
    responses: tuple[int, ...]
    """Of a pair the chosen and the rejected one; of a conversation all from its first answer on."""
    predicted: int
    """Of all responses together."""
    source: str = ""
    """Whose means they are."""

    @property
    def kind(self) -> str:
        """What such a row is, in the plural."""
        return "pairs" if len(self.responses) > 1 else "conversations"

    def __str__(self) -> str:
        parts = "prompt, chosen, rejected" if len(self.responses) > 1 else "prompt, all behind it"
        predicted = "" if self.predicted == sum(self.responses) else f", {self.predicted} of them predicted"
        numbers = " + ".join(map(str, (self.prompt, *self.responses)))
        return f"{self.kind} of {numbers} tokens ({parts}{predicted}; {self.source}'s means)"

    def _prompts(self, share_prompt: bool) -> int:
        """How often the prompt stands in a row."""
        return 1 if share_prompt else len(self.responses)

    def tokens(self, *, share_prompt: bool) -> int:
        """Tokens that it takes in a packed row; the last token of a response is only ever a target."""
        return self.prompt * self._prompts(share_prompt) + sum(self.responses) - len(self.responses)

    def attended(self, *, share_prompt: bool) -> int:
        """(Query, key) pairs."""
        prompts = causal_pairs(self.prompt) * self._prompts(share_prompt)
        return prompts + sum(causal_pairs(length - 1, prefix=self.prompt) for length in self.responses)


PAIR = Lengths(150, (280, 243), 523, "UltraFeedback")
"""UltraFeedback-binarized: from the byte counts of its dataset card at 4.65 characters per token; the rejected answers'
share is an assumption."""
TURNS = 3.16
"""Answers of an UltraChat-200k conversation: its ShareGPT form (`human`, `gpt` for `user`, `assistant`) is 5 bytes per
exchange shorter, and 3,288,970 bytes for 207,865 conversations."""
CONVERSATION = Lengths(185, (1075,), 990, "UltraChat")
"""UltraChat-200k: 5,831 bytes of a rendered conversation (from a set of the same rows with such a column beside
them), of which about 115 are marks; the first prompt is what is left of a row's 6,721 bytes, 840. At 4.65 bytes per
token, with 5 tokens of marks per turn. That later questions have 130 bytes is an assumption; what `data.max_length`
cuts is counted."""


def typical_row(config: Config) -> Lengths:
    """What a row of the training data is assumed to be; a conversation where `data.train.schema` is one of these."""
    if not takes_conversations(config) or config.data.train.schema not in CONVERSATION_SCHEMAS:
        return PAIR
    behind = CONVERSATION.responses[0]
    if config.data.predict == "all":
        whole = CONVERSATION.prompt + behind - 1
        return replace(CONVERSATION, prompt=1, responses=(whole,), predicted=whole)
    if config.data.predict == "last":
        last = round(CONVERSATION.predicted / TURNS)
        return replace(CONVERSATION, prompt=CONVERSATION.prompt + behind - last, responses=(last,), predicted=last)
    return CONVERSATION


def takes_conversations(config: Config) -> bool:
    """Whether the loss trains on conversations beside pairs."""
    return "conversations" in config.loss.takes


def assumption(config: Config) -> str:
    """What is assumed of the rows, in words."""
    row = typical_row(config)
    if takes_conversations(config) and row is PAIR:
        return f"{row}; for conversations give data.train.schema=conversation"
    return str(row)


def rows_of_data(config: Config) -> int:
    """Typical rows of data that a micro-batch holds."""
    tokens = typical_row(config).tokens(share_prompt=config.data.share_prompt)
    fitting = max(1, config.data.row_budget // tokens)
    return min(fitting, config.model.micro_batch_size or fitting)


def step_rows(config: Config, data_parallel: int) -> tuple[int, RowSize]:
    """Micro-batches of a replica in a step of typical rows of data, and what one of them holds."""
    examples = config.model.global_batch_size // data_parallel
    rows = -(-examples // rows_of_data(config))
    if config.model.virtual_pipeline_model_parallel_size is not None:
        stages = config.model.pipeline_model_parallel_size
        rows = -(-rows // stages) * stages
    row = row_of(config, examples / rows)
    if config.model.tp_comm_overlap:
        # Transformer Engine's buffers have one shape, to which every row is padded.
        row = replace(row, tokens=longest_row(config, gpu=True))
    return rows, row


def row_of(config: Config, examples: float) -> RowSize:
    """A micro-batch of so many typical rows of data."""
    lengths, share = typical_row(config), config.data.share_prompt
    return RowSize(
        tokens=round(examples * lengths.tokens(share_prompt=share)),
        predicted=round(examples * lengths.predicted),
        attended=round(examples * lengths.attended(share_prompt=share)),
    )


def filling_lengths(config: Config) -> Lengths:
    """Lengths like typical ones, stretched so that :func:`rows_of_data` such rows fill the row's budget."""
    share, typical = config.data.share_prompt, typical_row(config)
    wanted, now = config.data.row_budget // rows_of_data(config), typical.tokens(share_prompt=config.data.share_prompt)
    prompt, *first = (max(2, length * wanted // now) for length in (typical.prompt, *typical.responses[:-1]))
    rest = wanted - replace(typical, prompt=prompt, responses=(*first, 0)).tokens(share_prompt=share)
    responses = (*first, max(rest, 2))
    predicted = max(2, sum(responses) * typical.predicted // sum(typical.responses))
    return replace(typical, prompt=prompt, responses=responses, predicted=predicted)

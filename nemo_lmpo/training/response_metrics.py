"""The metrics of examples that have one response: conversations."""

from __future__ import annotations

import math

import torch

from nemo_lmpo.loss.interface import ResponseInputs
from nemo_lmpo.loss.registry import PreferenceLoss
from nemo_lmpo.training.example_table import ExampleTable

LOGPS, LENGTH, CORRECT = "logps/sum", "lengths/predicted", "correct"
BASE_COLUMNS = ("loss", LOGPS, LENGTH, CORRECT)


def response_columns(loss: PreferenceLoss) -> tuple[str, ...]:
    """The values that a loss gives for each response; asked of the loss itself, on one made-up response."""
    probe = torch.full((1,), -1.0)
    return (*BASE_COLUMNS, *loss.of_responses(ResponseInputs(probe, -probe, mean_length=1.0)).metrics)


class ResponseMetrics(ExampleTable):
    """The values of each single response, and the metrics made of them."""

    of_each_source = ("loss", "perplexity", "token_accuracy", LENGTH)
    over_tokens = False
    """Whether the loss is a mean over tokens, so that an example weighs as much as it has of them."""

    def metrics(self) -> dict[str, float]:
        """Loss, perplexity and share of right tokens, over all predicted tokens; means over examples of the rest.

        A token is right where no other one is more probable.
        """
        if not len(self.values):
            return dict.fromkeys((*self.columns[:1], "perplexity", "token_accuracy", LENGTH), math.nan)
        tokens = float(self.column(LENGTH).sum())
        per_token = -float(self.column(LOGPS).sum()) / tokens
        further = self.columns[len(BASE_COLUMNS) :]
        return {
            "loss": per_token if self.over_tokens else float(self.column("loss").mean()),
            "perplexity": math.exp(min(per_token, MOST_NATS)),
            "token_accuracy": float(self.column(CORRECT).sum()) / tokens,
            LENGTH: tokens / len(self.values),
            **{name: float(self.column(name).mean()) for name in further},
        }


MOST_NATS = 700.0
"""A perplexity of more nats a token is no finite number."""

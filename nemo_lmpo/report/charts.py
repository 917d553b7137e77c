"""Which charts there are: the only place that says what is shown together, in which words and colours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One metric in a panel."""

    metric: str
    label: str
    role: str
    """Names the colour, which is the same for a thing in all charts."""
    smooth: bool = True
    scale: float = 1.0


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    ylabel: str
    curves: tuple[Curve, ...]
    reference: tuple[float, str] | None = None
    """A level to compare with, and what it is."""
    band: tuple[str, str, str] | None = None
    """Metric of the centre, metric of the half-width, and label."""
    floor: float | None = None
    """The axis never goes below this."""
    ceiling: float | None = None
    """And never above this."""


@dataclass(frozen=True)
class Chart:
    """A picture: panels above each other over the steps of the run."""

    name: str
    """The PNG's file name."""
    title: str
    caption: str
    panels: tuple[Panel, ...]


def _pair(metric: str) -> tuple[Curve, Curve]:
    """Both responses of a metric whose name has a place for which one."""
    one, other = (Curve(metric.format(side), side, side) for side in ("chosen", "rejected"))
    return one, other


LOGPS = Chart(
    "logps",
    "Log-probabilities of the responses",
    "Mean log-probability of a response token: chosen above, rejected below, as in Figure 2 of the paper. "
    "LMPO is to hold both up while their distance grows.",
    (
        Panel("chosen (nats per token)", (Curve("logps/chosen", "chosen", "chosen"),)),
        Panel("rejected (nats per token)", (Curve("logps/rejected", "rejected", "rejected"),)),
    ),
)

CHARTS: tuple[Chart, ...] = (
    LOGPS,
    Chart(
        "margins",
        "Reward margin",
        "Reward of the chosen response less that of the rejected one. Above zero, the model prefers the right one.",
        (Panel("margin", (Curve("rewards/margins", "margin", "margin"),), reference=(0.0, "no preference")),),
    ),
    Chart(
        "accuracy",
        "Preference accuracy",
        "Share of pairs whose chosen response has the higher reward.",
        (
            Panel(
                "pairs ranked right (%)",
                (Curve("rewards/accuracies", "accuracy", "accuracy", scale=100.0),),
                reference=(50.0, "chance"),
                floor=0.0,
                ceiling=100.0,
            ),
        ),
    ),
    Chart(
        "rewards",
        "Implicit rewards",
        "What the loss compares: for LMPO and SimPO, beta times the mean log-probability of a token.",
        (Panel("reward", _pair("rewards/{}")),),
    ),
    Chart(
        "loss",
        "Loss",
        "Mean over a step: of its pairs, or of the tokens that SFT predicts.",
        (Panel("loss", (Curve("loss", "loss", "loss"),)),),
    ),
    Chart(
        "perplexity",
        "Perplexity and token accuracy",
        "Of the tokens that SFT predicts; a token is right where no other one is more probable.",
        (
            Panel("perplexity", (Curve("perplexity", "perplexity", "loss"),)),
            Panel(
                "tokens predicted right (%)",
                (Curve("token_accuracy", "token accuracy", "accuracy", scale=100.0),),
                floor=0.0,
                ceiling=100.0,
            ),
        ),
    ),
    Chart(
        "margin_statistics",
        "LMPO margin and its running statistics",
        "Above, the margin m of Eq. 7 with the running mean and standard deviation that normalise it; in the "
        "middle, the normalised margin that enters the loss; below, the length-normalised probabilities of Eq. 8.",
        (
            Panel(
                "margin m",
                (
                    Curve("lmpo/margin", "batch mean", "margin"),
                    Curve("lmpo/mean", "running mean", "neutral", smooth=False),
                ),
                band=("lmpo/mean", "lmpo/std", "± std"),
            ),
            Panel("normalised margin", (Curve("lmpo/margin_normalized", "normalised margin", "margin"),)),
            Panel("probability p", _pair("lmpo/p_{}"), floor=0.0),
        ),
    ),
    Chart(
        "lengths",
        "Response lengths in the batches",
        "Tokens of the responses in the data, to read the other curves by; they do not depend on the model.",
        (Panel("tokens per response", _pair("lengths/{}"), floor=0.0),),
    ),
    Chart(
        "logps_sum",
        "Log-probabilities of whole responses",
        "Sum over the tokens of a response. Long responses have low sums, whatever the model thinks of them.",
        (Panel("log-probability (nats)", _pair("logps/{}_sum")),),
    ),
    Chart(
        "optimization",
        "Learning rate and gradient norm",
        "The gradient norm is the one before clipping.",
        (
            Panel("learning rate", (Curve("lr", "learning rate", "neutral", smooth=False),), floor=0.0),
            Panel("gradient norm", (Curve("grad_norm", "gradient norm", "loss"),), floor=0.0),
        ),
    ),
    Chart(
        "throughput",
        "Throughput and memory",
        "Over all devices; utilisation is the share of the devices' peak BF16 rate, memory the peak of one process.",
        (
            Panel("pairs per second", (Curve("pairs_per_second", "pairs/s", "neutral"),), floor=0.0),
            Panel(
                "conversations per second",
                (Curve("conversations_per_second", "conversations/s", "neutral"),),
                floor=0.0,
            ),
            Panel("answers per second", (Curve("answers_per_second", "answers/s", "neutral"),), floor=0.0),
            Panel("tokens per second", (Curve("tokens_per_second", "tokens/s", "neutral"),), floor=0.0),
            Panel("utilisation (%)", (Curve("mfu", "MFU", "neutral", scale=100.0),), floor=0.0),
            Panel("peak memory (GiB)", (Curve("memory/peak", "memory", "loss", smooth=False),), floor=0.0),
        ),
    ),
)

"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import log_ratios, shared_log_ratios
from nemo_lmpo.loss.options import FINITE, POSITIVE, PreferenceOptions, option


@dataclass(frozen=True)
class DPOConfig(PreferenceOptions):
    """Options of DPO."""

    name: str = "dpo"
    beta: float = option(0.01, FINITE, POSITIVE)
    """Strength of the pull to the reference. SimPO's README gives 0.01 as the best for DPO in all of its settings.
    With ``average_log_probs`` it counts per token and must be larger: 5 in Tulu 3 (arXiv:2411.15124)."""
    average_log_probs: bool = False
    """Log-ratios per token instead of sums: length-normalized DPO, as in Tulu 3 (TRL's `sigmoid_norm`)."""
    ld_alpha: float | None = option(None, ("between 0 and 1; unset it for plain DPO", lambda value: 0 <= value <= 1))
    """LD-DPO (arXiv:2409.06411): weight of a response's tokens beyond the length of the shorter response, 0 to 1.
    1 or unset: plain DPO; 0: only the common length counts."""


def dpo_needs_shared(config: DPOConfig) -> bool:
    """Whether the loss needs ``*_shared_logps``: LD-DPO does."""
    return config.ld_alpha is not None


def dpo_loss(inputs: LossInputs, config: DPOConfig) -> LossOutputs:
    """DPO per pair (its Eq. 7), ``[B]``.

    Formula: ``-logsigmoid(beta (rho_w - rho_l))`` where ``rho = S - S_ref`` with sums ``S`` = ``*_logps`` and
    ``S_ref`` = ``reference_*_logps``; with ``config.average_log_probs`` ``rho / n``. LD-DPO splits ``rho`` after
    ``min(n_w, n_l)`` tokens: ``rho_shared + ld_alpha (rho - rho_shared)``. Rewards are ``beta rho``.
    """
    ratio_w, ratio_l = log_ratios(inputs)
    if config.ld_alpha is not None:
        shared_w, shared_l = shared_log_ratios(inputs)
        ratio_w = shared_w + config.ld_alpha * (ratio_w - shared_w)
        ratio_l = shared_l + config.ld_alpha * (ratio_l - shared_l)
    if config.average_log_probs:
        ratio_w, ratio_l = ratio_w / inputs.chosen_lengths, ratio_l / inputs.rejected_lengths
    return LossOutputs(-F.logsigmoid(config.beta * (ratio_w - ratio_l)), config.beta * ratio_w, config.beta * ratio_l)

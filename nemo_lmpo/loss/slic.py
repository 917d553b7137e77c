"""Sequence likelihood calibration, SLiC-HF (Zhao et al. 2023, arXiv:2305.10425)."""

from __future__ import annotations

import torch.nn.functional as F

from nemo_lmpo.loss.interface import LossInputs, LossOutputs
from nemo_lmpo.loss.numerics import chosen_nll, sums
from nemo_lmpo.loss.options import SLiCConfig


def slic_loss(inputs: LossInputs, config: SLiCConfig) -> LossOutputs:
    """SLiC-HF per pair, with the chosen response as the target of its regulariser, ``[B]``.

    Formula: ``max(0, delta - S_w + S_l) + lambda nll_w`` with sums ``S`` = ``*_logps`` and ``nll_w`` = ``-S_w`` (or as
    ``config.nll`` says). Rewards are ``S``, what the hinge compares.
    """
    sum_w, sum_l = sums(inputs)
    return LossOutputs(F.relu(config.delta - sum_w + sum_l) + config.lam * chosen_nll(inputs, config.nll), sum_w, sum_l)

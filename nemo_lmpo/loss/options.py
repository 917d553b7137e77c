"""Options that all preference losses share."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lmpo.loss.checks import check_non_negative


@dataclass(frozen=True)
class PreferenceOptions:
    """The base of a preference loss's options."""

    sft_weight: float = 0.0
    """Weight of ``-S_w / n_w``, the mean negative log-likelihood of the chosen response, which is added to the loss:
    it holds up the likelihood of chosen responses, which preference losses let fall. 0: off, as published."""

    def validate(self) -> None:
        """Check the shared options; raises ConfigError. A loss's own checks come on top."""
        check_non_negative("sft_weight", self.sft_weight)

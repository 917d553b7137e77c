"""The losses against TRL's, value and gradient; TRL is no dependency, so all of it is skipped where it is not there.

TRL computes DPO's and KTO's losses inside a method that also runs the model and logs. Here the model is a stub whose
per-token log-probabilities are given, and everything that is only logged is zero.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed (pip install trl accelerate)")
pytest.importorskip("accelerate", reason="TRL's trainers need accelerate")

TESTED = (1, 16)
"""The release that these stubs were written for."""
version = tuple(int(part) for part in trl.__version__.split(".")[:2])
if version < TESTED or version[0] != TESTED[0]:
    pytest.skip(f"written for TRL {TESTED[0]}.{TESTED[1]} and later of that line, not {trl.__version__}", True)

from trl.experimental.cpo.cpo_trainer import CPOTrainer  # noqa: E402
from trl.experimental.orpo.orpo_trainer import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

PAIRS, PROMPT, RESPONSE = 5, 3, 12


class Batch:
    """Random pairs: per-token log-probabilities as TRL sees them, sums and lengths as ours does."""

    def __init__(self, drift: float) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (2 * PAIRS, PROMPT + RESPONSE)
        self.lengths = torch.randint(1, RESPONSE + 1, (2 * PAIRS,), generator=generator)
        positions = torch.arange(shape[1])
        self.completion_mask = ((positions >= PROMPT) & (positions < PROMPT + self.lengths[:, None])).long()
        tokens = -2 * torch.rand(2 * PAIRS, shape[1] - 1, generator=generator, dtype=torch.float64)
        self.tokens = (tokens * self.completion_mask[:, 1:]).requires_grad_()
        noise = torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)
        self.reference = self.tokens.detach().sum(1) - drift + noise
        self.attention_mask = torch.ones(shape, dtype=torch.long)
        self.input_ids = torch.zeros(shape, dtype=torch.long)

    def ours(self) -> LossInputs:
        chosen, rejected = self.tokens.sum(1).chunk(2)
        lengths = self.lengths.double().chunk(2)
        return LossInputs(chosen, rejected, *lengths, *self.reference.chunk(2))

    def stub(self, **_: Any) -> SimpleNamespace:
        """A model's answer."""
        unused = torch.zeros_like(self.tokens)
        return SimpleNamespace(log_probs=self.tokens, entropy=unused, mean_logits=unused, is_top1=unused.bool())


def trainer(**settings: Any) -> SimpleNamespace:
    def same(values: torch.Tensor) -> torch.Tensor:
        return values

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=metrics,
        _total_train_tokens=0,
        **settings,
    )


def assert_same(batch: Batch, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(loss, batch.tokens, retain_graph=True)[0] for loss in (ours, theirs)]
    mask = batch.completion_mask[:, 1:]
    torch.testing.assert_close(grads[0] * mask, grads[1] * mask, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("loss_type", "beta", "options"),
    [
        ("sigmoid", 0.1, {"name": "dpo", "beta": 0.1}),
        ("ipo", 0.3, {"name": "ipo", "tau": 0.3}),
    ],
)
def test_losses_of_the_dpo_trainer(loss_type, beta, options):
    batch = Batch(drift=1.0)
    inputs = batch.ours()
    fake = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
    )
    reference = batch.reference.chunk(2)
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": batch.completion_mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    theirs = DPOTrainer._compute_loss(fake, batch.stub, given, False)
    outputs = build_loss(parse_loss(options))(inputs)
    assert_same(batch, outputs.losses.mean(), theirs)
    if loss_type == "sigmoid":
        metrics = fake._metrics["eval"]
        assert outputs.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"][0])
        assert outputs.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"][0])


def test_slic_hinge_is_the_dpo_trainers_hinge_without_a_reference():
    # TRL: max(0, 1 - beta (chosen - rejected)); ours with delta 1 and no regulariser, at beta 1 and reference 0.
    batch = Batch(drift=0.0)
    fake = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["hinge"],
        loss_weights=[1.0],
        beta=1.0,
        use_weighting=False,
    )
    zeros = torch.zeros(PAIRS, dtype=torch.float64)
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": batch.completion_mask,
        "ref_chosen_logps": zeros,
        "ref_rejected_logps": zeros,
    }
    theirs = DPOTrainer._compute_loss(fake, batch.stub, given, False)
    losses = build_loss(parse_loss({"name": "slic", "delta": 1.0, "lam": 0.0}))(batch.ours()).losses
    assert 0 < (losses > 0).sum() < PAIRS
    assert_same(batch, losses.mean(), theirs)


@pytest.mark.parametrize("drift", [3.0, -3.0])
def test_kto_with_its_own_responses_as_kl_estimate(drift):
    batch = Batch(drift)
    inputs = batch.ours()
    policy = batch.tokens.detach().sum(1)
    fake = trainer(
        beta=0.1,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        _compute_kl_logps=lambda model, given: policy,
    )
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": batch.completion_mask,
        "label": torch.tensor([True] * PAIRS + [False] * PAIRS),
        "ref_logps": batch.reference,
        "ref_KL_logps": batch.reference,
    }
    theirs = KTOTrainer._compute_loss(fake, batch.stub, given, False)
    loss = build_loss(parse_loss({"name": "kto", "beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.6}))
    running = RunningStatistics(loss.statistics)
    running.update(loss.observe(inputs))
    outputs = loss(replace(inputs, statistics=running.current()))
    assert outputs.metrics["kto/z"][0].item() == pytest.approx(0.1 * fake._metrics["eval"]["kl"][0])
    assert (outputs.metrics["kto/z"][0].item() > 0) == (drift > 0)
    assert_same(batch, outputs.losses.mean(), theirs)


def test_simpo_and_cpo_of_the_cpo_trainer():
    batch = Batch(drift=0.0)
    inputs = batch.ours()
    averages = inputs.chosen_logps / inputs.chosen_lengths, inputs.rejected_logps / inputs.rejected_lengths
    fake = trainer(beta=2.0, loss_type="simpo", simpo_gamma=1.6, label_smoothing=0.0, alpha=0.0)
    theirs, chosen, rejected = CPOTrainer.cpo_loss(fake, *averages)
    outputs = build_loss(parse_loss({"name": "simpo", "beta": 2.0, "gamma": 1.6}))(inputs)
    torch.testing.assert_close(outputs.losses, theirs)
    torch.testing.assert_close(outputs.chosen_rewards, chosen)
    torch.testing.assert_close(outputs.rejected_rewards, rejected)
    assert_same(batch, outputs.losses.mean(), theirs.mean())

    fake = trainer(beta=0.1, loss_type="sigmoid", label_smoothing=0.0, alpha=0.0)
    theirs, chosen, rejected = CPOTrainer.cpo_loss(fake, inputs.chosen_logps, inputs.rejected_logps)
    outputs = build_loss(parse_loss({"name": "cpo", "beta": 0.1, "lam": 0.0}))(inputs)
    torch.testing.assert_close(outputs.losses, theirs)
    torch.testing.assert_close(outputs.chosen_rewards, chosen)
    torch.testing.assert_close(outputs.rejected_rewards, rejected)
    assert_same(batch, outputs.losses.mean(), theirs.mean())


def test_lmpo_without_margin_is_the_cpo_trainers_simpo():
    batch = Batch(drift=0.0)
    inputs = batch.ours()
    averages = inputs.chosen_logps / inputs.chosen_lengths, inputs.rejected_logps / inputs.rejected_lengths
    fake = trainer(beta=2.0, loss_type="simpo", simpo_gamma=1.6, label_smoothing=0.0, alpha=0.0)
    theirs, _, _ = CPOTrainer.cpo_loss(fake, *averages)
    losses = build_loss(parse_loss({"beta": 2.0, "log_h": 1.6, "lam": 0.0}))(inputs).losses
    assert_same(batch, losses.mean(), theirs.mean())


def test_orpo_odds_ratio_term():
    batch = Batch(drift=0.0)
    inputs = batch.ours()
    averages = inputs.chosen_logps / inputs.chosen_lengths, inputs.rejected_logps / inputs.rejected_lengths
    fake = trainer(beta=0.4)
    theirs, chosen, rejected, _, _ = ORPOTrainer.odds_ratio_loss(fake, *averages)
    outputs = build_loss(parse_loss({"name": "orpo", "lam": 0.4}))(inputs)
    # TRL goes through float32 here and subtracts the term from the likelihood of the batch's tokens.
    torch.testing.assert_close(outputs.losses, (-averages[0] - theirs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs.chosen_rewards, chosen.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs.rejected_rewards, rejected.double(), rtol=1e-6, atol=1e-6)


def test_sft_of_one_pair():
    batch = Batch(drift=0.0)
    fake = trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=["sft"],
        loss_weights=[1.0],
        beta=0.1,
        use_weighting=False,
    )
    # TRL averages over the batch's tokens, ours over responses: equal where there is one response.
    inputs = batch.ours()
    for pair in range(PAIRS):
        rows = [pair, PAIRS + pair]
        unused = torch.zeros_like(batch.tokens[rows])

        def stub(rows=rows, unused=unused, **_: Any) -> SimpleNamespace:
            log_probs = batch.tokens[rows]
            return SimpleNamespace(log_probs=log_probs, entropy=unused, mean_logits=unused, is_top1=unused.bool())

        given = {
            "input_ids": batch.input_ids[rows],
            "attention_mask": batch.attention_mask[rows],
            "completion_mask": batch.completion_mask[rows],
            "ref_chosen_logps": batch.reference[rows[:1]],
            "ref_rejected_logps": batch.reference[rows[1:]],
        }
        theirs = DPOTrainer._compute_loss(fake, stub, given, False)
        assert_same(batch, build_loss(parse_loss({"name": "sft"}))(inputs).losses[pair], theirs)

"""The losses against TRL's, value and gradient. TRL is a package for tests only, never for running.

TRL computes DPO's and KTO's losses inside a method that also runs the model and logs. Here the model is a stub whose
per-token log-probabilities or logits are given, and everything that is only logged is zero.
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

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

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
        moved = (noise - drift)[:, None] * self.completion_mask[:, 1:] / self.lengths[:, None]
        self.reference_tokens = self.tokens.detach() + moved
        self.reference = self.reference_tokens.sum(1)
        self.attention_mask = torch.ones(shape, dtype=torch.long)
        self.input_ids = torch.zeros(shape, dtype=torch.long)

    def ours(self) -> LossInputs:
        chosen, rejected = self.tokens.sum(1).chunk(2)
        lengths = self.lengths.double().chunk(2)
        common = torch.minimum(*self.lengths.chunk(2)).repeat(2)
        shared = (torch.arange(self.tokens.shape[1]) < PROMPT - 1 + common[:, None]).double()
        columns: Any = (
            *(chosen, rejected, *lengths, *self.reference.chunk(2)),
            *(self.tokens * shared).sum(1).chunk(2),
            *(self.reference_tokens * shared).sum(1).chunk(2),
        )
        known: dict[str, Any] = {"mean_chosen_length": lengths[0].mean().item()}
        return LossInputs(*columns, **known)

    def pair(self, number: int) -> Batch:
        """One of the pairs as a batch of its own, on the same tokens."""
        rows = [number, PAIRS + number]
        one = object.__new__(Batch)
        one.tokens = self.tokens[rows]
        for name in ("lengths", "completion_mask", "reference_tokens", "reference", "attention_mask", "input_ids"):
            setattr(one, name, getattr(self, name)[rows])
        return one

    def given(self) -> dict[str, torch.Tensor]:
        """What TRL's DPO trainer takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "completion_mask": self.completion_mask,
        }

    def stub(self, **_: Any) -> SimpleNamespace:
        """The policy's answer."""
        unused = torch.zeros_like(self.tokens)
        return SimpleNamespace(log_probs=self.tokens, entropy=unused, mean_logits=unused, is_top1=unused.bool())

    def stub_reference(self, **_: Any) -> SimpleNamespace:
        """The reference model's answer."""
        return SimpleNamespace(log_probs=self.reference_tokens)


def trainer(**settings: Any) -> SimpleNamespace:
    def same(values: torch.Tensor) -> torch.Tensor:
        return values

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    metrics: Any = defaultdict(lambda: defaultdict(list))
    model: Any = torch.nn.Module().eval()
    model.is_gradient_checkpointing = False
    return SimpleNamespace(
        model=model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics=metrics,
        _total_train_tokens=0,
        **settings,
    )


def assert_same(batch: Batch, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(loss, batch.tokens, retain_graph=True)[0] for loss in (ours, theirs)]
    mask = batch.completion_mask[:, 1:]
    torch.testing.assert_close(grads[0] * mask, grads[1] * mask, rtol=1e-9, atol=1e-9)


def dpo_trainer_loss(batch: Batch, **settings: Any) -> tuple[torch.Tensor, Any]:
    """The loss of TRL's DPO trainer, and what it would log."""
    defaults: dict[str, Any] = {"ld_alpha": None, "loss_weights": [1.0], "f_divergence_type": "reverse_kl"}
    fake = trainer(**{**defaults, "use_weighting": False, "ref_model": batch.stub_reference, **settings})
    fake.precompute_ref_logps = False
    return DPOTrainer._compute_loss(fake, batch.stub, batch.given(), False), fake._metrics["eval"]


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"loss_types": ["sigmoid"], "beta": 0.1}, {"name": "dpo", "beta": 0.1}),
        ({"loss_types": ["ipo"], "beta": 0.3}, {"name": "ipo", "tau": 0.3}),
        (
            {"loss_types": ["sigmoid_norm"], "beta": 5.0},
            {"name": "dpo", "beta": 5.0, "average_log_probs": True},
        ),
        *(
            ({"loss_types": ["sigmoid"], "beta": 0.1, "ld_alpha": a}, {"name": "dpo", "beta": 0.1, "ld_alpha": a})
            for a in (0.0, 0.4, 1.0)
        ),
        (
            {"loss_types": ["sigmoid_norm"], "beta": 5.0, "ld_alpha": 0.4},
            {"name": "dpo", "beta": 5.0, "ld_alpha": 0.4, "average_log_probs": True},
        ),
    ],
)
def test_losses_of_the_dpo_trainer(settings: dict[str, Any], options: dict[str, Any]) -> None:
    batch = Batch(drift=1.0)
    theirs, metrics = dpo_trainer_loss(batch, **settings)
    outputs = build_loss(parse_loss(options))(batch.ours())
    assert_same(batch, outputs.losses.mean(), theirs)
    if settings["loss_types"] == ["sigmoid"]:  # elsewhere TRL logs sums, not what the loss compares
        assert outputs.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"][0])
        assert outputs.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"][0])


def test_slic_hinge_is_the_dpo_trainers_hinge_without_a_reference() -> None:
    # TRL: max(0, 1 - beta (chosen - rejected)); ours with delta 1 and no regularizer, at beta 1 and reference 0.
    batch = Batch(drift=0.0)
    batch.reference_tokens = torch.zeros_like(batch.reference_tokens)
    theirs, _ = dpo_trainer_loss(batch, loss_types=["hinge"], beta=1.0)
    losses = build_loss(parse_loss({"name": "slic", "delta": 1.0, "lam": 0.0}))(batch.ours()).losses
    assert 0 < (losses > 0).sum() < PAIRS
    assert_same(batch, losses.mean(), theirs)


def test_sft_per_token_of_the_batch() -> None:
    batch = Batch(drift=0.0)
    theirs, _ = dpo_trainer_loss(batch, loss_types=["sft"], beta=0.1)
    losses = build_loss(parse_loss({"name": "sft", "nll": "token_mean"}))(batch.ours()).losses
    assert_same(batch, losses.mean(), theirs)


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("sigmoid", {"name": "dpo", "beta": 0.1}),
        ("ipo", {"name": "ipo", "tau": 0.1}),
        ("hinge", {"name": "slic", "delta": 10.0, "lam": 0.0}),  # ten times TRL's, at beta 0.1
    ],
)
def test_sft_weight_is_the_dpo_trainers_loss_mix(loss_type: str, options: dict[str, Any]) -> None:
    # TRL's likelihood is a mean over the batch's tokens, ours over responses: equal where there is one response.
    batch = Batch(drift=1.0)
    scale = 10.0 if loss_type == "hinge" else 1.0
    if loss_type == "hinge":
        batch.reference_tokens = torch.zeros_like(batch.reference_tokens)
    losses = build_loss(parse_loss({**options, "sft_weight": 0.3}))(batch.ours()).losses
    for number in range(PAIRS):
        mix = {"loss_types": [loss_type, "sft"], "loss_weights": [scale, 0.3], "beta": 0.1}
        assert_same(batch, losses[number], dpo_trainer_loss(batch.pair(number), **mix)[0])


def cpo_trainer_loss(batch: Batch, logits: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The whole objective of TRL's CPO trainer on a model's ``[2 B, L, V]`` logits."""
    fake = trainer(label_smoothing=0.0, alpha=0.0, is_encoder_decoder=False, pad_token_id=0, **settings)
    fake.concatenated_inputs, fake.get_batch_logps = CPOTrainer.concatenated_inputs, CPOTrainer.get_batch_logps
    fake.concatenated_forward = lambda model, given: CPOTrainer.concatenated_forward(fake, model, given)
    fake.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(fake, *logps)
    labels = batch.input_ids.masked_fill(batch.completion_mask == 0, -100)
    given = {}
    for side, half in (("chosen", slice(None, len(labels) // 2)), ("rejected", slice(len(labels) // 2, None))):
        given[f"{side}_input_ids"] = batch.input_ids[half]
        given[f"{side}_attention_mask"] = batch.attention_mask[half]
        given[f"{side}_labels"] = labels[half]
    total: torch.Tensor = CPOTrainer.get_batch_loss_metrics(
        fake, lambda *_, **__: SimpleNamespace(logits=logits), given
    )[0]
    return total


class TestWholeCPOObjective:
    """Preference and likelihood together, from logits; the likelihood is where definitions differ."""

    VOCABULARY = 7

    def batch(self) -> tuple[Batch, torch.Tensor]:
        batch = Batch(drift=0.0)
        generator = torch.Generator().manual_seed(8)
        batch.input_ids = torch.randint(self.VOCABULARY, batch.input_ids.shape, generator=generator)
        shape = (*batch.input_ids.shape, self.VOCABULARY)
        logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
        batch.tokens = logps * batch.completion_mask[:, 1:]
        return batch, logits

    @staticmethod
    def assert_same(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)

    def test_token_mean_is_that_of_one_micro_batch(self) -> None:
        batch, logits = self.batch()
        theirs = cpo_trainer_loss(batch, logits, beta=0.01, loss_type="sigmoid", cpo_alpha=1.0)
        ours = build_loss(parse_loss({"name": "cpo", "nll": "token_mean"}))(batch.ours()).losses.mean()
        self.assert_same(ours, theirs, logits)

    @pytest.mark.parametrize(
        ("loss_type", "settings", "options"),
        [
            ("sigmoid", {"beta": 0.01, "cpo_alpha": 1.0}, {"name": "cpo"}),
            (
                "simpo",  # CPO-SimPO: SimPO with a likelihood
                {"beta": 2.0, "simpo_gamma": 1.6, "cpo_alpha": 0.5},
                {"name": "simpo", "beta": 2.0, "gamma": 1.6, "sft_weight": 0.5},
            ),
            ("hinge", {"beta": 1.0, "cpo_alpha": 0.5}, {"name": "slic", "lam": 0.5, "nll": "mean"}),
        ],
    )
    def test_mean_is_that_of_one_pair_a_micro_batch(
        self, loss_type: str, settings: dict[str, float], options: dict[str, Any]
    ) -> None:
        batch, logits = self.batch()
        losses = build_loss(parse_loss(options))(batch.ours()).losses
        for number in range(PAIRS):
            rows = [number, PAIRS + number]
            theirs = cpo_trainer_loss(batch.pair(number), logits[rows], loss_type=loss_type, **settings)
            self.assert_same(losses[number], theirs, logits)


@pytest.mark.parametrize("drift", [3.0, -3.0])
def test_kto_with_its_own_responses_as_kl_estimate(drift: float) -> None:
    batch = Batch(drift)
    inputs = batch.ours()
    policy = batch.tokens.detach().sum(1)
    fake = trainer(
        beta=0.1,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
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


def test_simpo_and_cpo_of_the_cpo_trainer() -> None:
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


def test_lmpo_without_margin_is_the_cpo_trainers_simpo() -> None:
    batch = Batch(drift=0.0)
    inputs = batch.ours()
    averages = inputs.chosen_logps / inputs.chosen_lengths, inputs.rejected_logps / inputs.rejected_lengths
    fake = trainer(beta=2.0, loss_type="simpo", simpo_gamma=1.6, label_smoothing=0.0, alpha=0.0)
    theirs, _, _ = CPOTrainer.cpo_loss(fake, *averages)
    losses = build_loss(parse_loss({"beta": 2.0, "log_h": 1.6, "lam": 0.0}))(inputs).losses
    assert_same(batch, losses.mean(), theirs.mean())


def test_orpo_odds_ratio_term() -> None:
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


def test_sft_of_one_pair() -> None:
    # TRL averages over the batch's tokens, ours over responses: equal where there is one response.
    batch = Batch(drift=0.0)
    losses = build_loss(parse_loss({"name": "sft"}))(batch.ours()).losses
    for number in range(PAIRS):
        theirs, _ = dpo_trainer_loss(batch.pair(number), loss_types=["sft"], beta=0.1)
        assert_same(batch, losses[number], theirs)

"""Preference training written a second time, with nothing of the package but its generated pairs and its order.

transformers' Llama in float64 (its norms and rotary angles stay float32), one sequence at a time without packing,
torch's AdamW, and the LMPO formulas of the paper term by term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup


@dataclass(frozen=True)
class Pair:
    """Token ids; both responses follow the prompt."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def tokenize(rows: list[dict[str, Any]], tokenizer: Any) -> list[Pair]:
    """Conversations as the tokenizer's own chat template renders them."""

    def ids(messages: list[dict[str, str]], *, open_turn: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_turn)
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    pairs = []
    for row in rows:
        prompt = ids(row["chosen"][:-1], open_turn=True)
        sides = [ids(row[side], open_turn=False) for side in ("chosen", "rejected")]
        assert all(side[: len(prompt)] == prompt for side in sides)
        pairs.append(Pair(prompt, *(side[len(prompt) :] for side in sides)))
    return pairs


@dataclass
class Settings:
    """What the run under test was told."""

    beta: float = 2.0
    log_h: float = 1.0
    lam: float = 0.2
    released: bool = False
    cumulative: bool = False
    momentum: float = 0.9
    std_floor: float = 1e-6
    lr: float = 1e-3
    weight_decay: float = 0.0
    eps: float = 1e-5
    clip: float = 1.0
    warmup_steps: int = 0
    total_steps: int = 4


@dataclass
class MarginStatistics:
    """``a`` and ``b`` of Eq. 9, from every value that was ever seen."""

    settings: Settings
    batches: list[Tensor] = field(default_factory=list)

    def update(self, margins: Tensor) -> None:
        """Remember the margins of a batch."""
        self.batches.append(margins.detach())

    def current(self) -> tuple[float, float] | None:
        """Mean and standard deviation, or None before the first batch."""
        if not self.batches:
            return None
        if self.settings.cumulative:
            everything = torch.cat(self.batches)
            return float(everything.mean()), float(everything.std())
        g, count = self.settings.momentum, len(self.batches)
        # The recursion of Eq. 21-22 written out: batch k of n has weight (1 - g) g^(n - k).
        weights = [(1 - g) * g ** (count - 1 - k) for k in range(count)]
        correction = 1.0 if self.settings.released else 1 - g**count
        mean = sum(w * float(batch.mean()) for w, batch in zip(weights, self.batches, strict=True))
        std = sum(w * float(batch.std()) for w, batch in zip(weights, self.batches, strict=True))
        return mean / correction, max(std / correction, self.settings.std_floor)


def sequence_logp(model: LlamaForCausalLM, prompt: list[int], response: list[int]) -> Tensor:
    """Sum of the response's log-probabilities."""
    ids = torch.tensor([prompt + response])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double(), dim=-1)
    return sum((logp[len(prompt) - 1 + i, token] for i, token in enumerate(response)), torch.zeros(()).double())


def margin(s_w: Tensor, s_l: Tensor, n_w: int, n_l: int, settings: Settings) -> Tensor:
    """Eq. 7 and 8; the released code halves it and cuts its gradient."""
    p_w = torch.exp(s_w / n_w * (n_w + n_l) / (2 * n_w))
    p_l = torch.exp(s_l / n_l * (n_w + n_l) / (2 * n_l))
    m = (1 - p_w) * (1 - (p_w - p_l) ** 5)
    return (m / 2).detach() if settings.released else m


def pair_loss(s_w: Tensor, s_l: Tensor, pair: Pair, settings: Settings, ab: tuple[float, float] | None) -> Tensor:
    """Eq. 10 and 11: ``-log(1 / (1 + h exp(-d)))``."""
    n_w, n_l = len(pair.chosen), len(pair.rejected)
    normalised: Tensor | float = 0.0
    if ab is not None:
        normalised = (margin(s_w, s_l, n_w, n_l, settings) - ab[0]) / ab[1]
    d = settings.beta * s_w / n_w - settings.beta * s_l / n_l - settings.lam * normalised
    return torch.log(1 + math.exp(settings.log_h) * torch.exp(-d))


class PlainTrainer:
    """A training loop without any parallelism, packing or fused kernel."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        self.statistics = MarginStatistics(settings)
        self.model = LlamaForCausalLM(config)
        tied = {} if not config.tie_word_embeddings else {"lm_head.weight": weights["model.embed_tokens.weight"]}
        self.model.load_state_dict({**weights, **tied})
        self.model.double().train()
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(0.9, 0.999),
            eps=settings.eps,
        )
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, settings.warmup_steps, settings.total_steps)

    def losses(self, rows: list[list[Pair]], *, learning: bool) -> list[Tensor]:
        """Losses pair by pair; ``rows`` are the authors' micro-batches, which matter to the released code only."""
        losses, margins = [], []
        for row in rows:
            sums = [
                (sequence_logp(self.model, p.prompt, p.chosen), sequence_logp(self.model, p.prompt, p.rejected))
                for p in row
            ]
            values = torch.stack(
                [
                    margin(s_w, s_l, len(p.chosen), len(p.rejected), self.settings).detach()
                    for (s_w, s_l), p in zip(sums, row, strict=True)
                ]
            )
            if self.settings.released:
                self.statistics.update(values)
            ab = self.statistics.current()
            margins.append(values)
            losses += [pair_loss(*s, p, self.settings, ab) for s, p in zip(sums, row, strict=True)]
        if learning and not self.settings.released:
            self.statistics.update(torch.cat(margins))
        return losses

    def step(self, rows: list[list[Pair]]) -> dict[str, float]:
        """One optimizer step over a global batch."""
        before = self.statistics.current() or (0.0, 1.0)
        self.optimizer.zero_grad()
        losses = self.losses(rows, learning=True)
        loss = torch.stack(losses).sum() / len(losses)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.schedule.step()
        mean, std = (self.statistics.current() or (0.0, 1.0)) if self.settings.released else before
        return {"loss": float(loss), "grad_norm": float(norm), "lr": lr, "lmpo/mean": mean, "lmpo/std": std}

    @torch.no_grad()
    def validate(self, rows: list[list[Pair]]) -> float:
        """Mean loss of pairs that are not learned from."""
        return float(torch.stack(self.losses(rows, learning=False)).mean())

"""What the routers of a mixture do in a step: counted, told, and balanced where the run wants it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.model.mixture import BalanceTerm, RouterLoad, routers_of
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import StepBatch


class ExpertLoad:
    """The load of a mixture's experts over the tokens of a global batch."""

    def __init__(
        self, chunks: Sequence[nn.Module], architecture: Architecture, model: ModelConfig, groups: ParallelGroups
    ) -> None:
        """Of bare ``chunks`` of a model of experts.

        Args:
            chunks: this process's.
            architecture: with experts.
            model: says how to balance them.
            groups: who computes which tokens.
        """
        assert architecture.experts is not None
        self.experts, self.layers, self.groups = architecture.experts, architecture.num_layers, groups
        self.kind = model.moe_aux_loss
        self.coefficient = model.moe_aux_loss_coefficient
        self.routers = list(routers_of(chunks))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """For the block, count what tokens choose; what was counted before is gone."""
        for _, router in self.routers:
            router.load = RouterLoad(self.experts, router.weight.device)
        try:
            yield
        finally:
            self._sums = {layer: router.load.sums for layer, router in self.routers if router.load is not None}
            for _, router in self.routers:
                router.load = None

    @contextmanager
    def balanced(self, batch: StepBatch) -> Iterator[None]:
        """For the block, let routers add their term to the loss, if the run has one.

        Communicates: a number over the data-parallel group, if the term is over sequences.

        Args:
            batch: whose tokens were counted before, if the term is over the global batch.
        """
        terms = self._terms(batch) if self.kind is not None else []
        for (_, router), term in zip(self.routers, terms, strict=False):
            router.term = term
        self._values = {layer: term.value for (layer, _), term in zip(self.routers, terms, strict=False)}
        try:
            yield
        finally:
            for _, router in self.routers:
                router.term = None

    def _terms(self, batch: StepBatch) -> list[BalanceTerm]:
        device = self.routers[0][1].weight.device if self.routers else torch.device("cpu")
        if self.kind == "sequence":
            own = [part.membership.shape[0] for part in batch.micro_batches if part.membership is not None]
            count = torch.tensor(float(sum(own)), dtype=torch.float64, device=device)
            if self.groups.data.size() > 1:
                dist.all_reduce(count, group=self.groups.data)
            return [BalanceTerm(self.coefficient, None, count) for _ in self.routers]
        table = self._shared()
        number = self.experts.number
        choices, tokens = table[:, :number], table[:, 2 * number + 1]
        fractions = choices / choices.sum(dim=1, keepdim=True)
        return [BalanceTerm(self.coefficient, fractions[layer], tokens[layer]) for layer, _ in self.routers]

    def _shared(self) -> Tensor:
        """``[layers, 2 E + 3]`` float64: the sums of every layer over all tokens, and what balancing added.

        Communicates: an all-reduce over all ranks. Each token of a layer is routed on exactly one of them.
        """
        width = 2 * self.experts.number + 3
        device = self.routers[0][1].weight.device if self.routers else torch.device("cpu")
        table = torch.zeros(self.layers, width, dtype=torch.float64, device=device)
        for layer, sums in self._sums.items():
            table[layer, :-1] = sums
        for layer, value in getattr(self, "_values", {}).items():
            table[layer, -1] = value
        if dist.get_world_size() > 1:
            dist.all_reduce(table)
        return table

    def metrics(self) -> dict[str, float]:
        """Of what was counted last, the same on every rank; communicates an all-reduce over all ranks.

        `moe/max_over_mean`: choices of the busiest expert over the mean of all, of a layer in the mean, and
        `moe/max_over_mean_worst` of the worst layer; `moe/entropy`: of the softmax over all experts, a token in the
        mean, in nats; `moe/balance`: the Switch Transformer's term without its coefficient, 1 for equal loads;
        `moe/aux_loss`: what was added to the loss, over all layers; `moe/dropped`: the part of choices that no expert
        computed.
        """
        table, number = self._shared().cpu(), self.experts.number
        choices, softmax = table[:, :number], table[:, number : 2 * number]
        entropy, tokens, term = table[:, -3], table[:, -2], table[:, -1]
        means = choices.sum(dim=1) / number
        busiest = choices.amax(dim=1) / means
        balance = number * (choices / choices.sum(dim=1, keepdim=True) * softmax / tokens[:, None]).sum(dim=1)
        return {
            "moe/max_over_mean": float(busiest.mean()),
            "moe/max_over_mean_worst": float(busiest.max()),
            "moe/entropy": float((entropy / tokens).mean()),
            "moe/balance": float(balance.mean()),
            "moe/aux_loss": float(term.sum()),
            "moe/dropped": float(1 - choices.sum() / (self.experts.per_token * tokens.sum())),
        }

"""Mixtures of experts: megatron-core's layers, with a router that counts what it does, and balances it exactly.

megatron-core scales its own auxiliary loss by the tokens of a rank and expects all gradients to be divided by all
tokens at the end of the step, which does not happen here: losses are divided before. It also balances the tokens of one
micro-batch, which depend on how pairs are packed. Here the term is over the tokens of the global batch, or over those
of each sequence, and added up over ranks and micro-batches it is the same in every layout.

For a layer with ``E`` experts, of which a token gets ``K``, it is that of the Switch Transformer (Fedus et al. 2021):
``E * sum_i f_i P_i``, where ``f_i`` is the fraction of choices that fell on expert ``i`` and ``P_i`` the mean over
tokens of its part of the softmax over all experts. It is 1 where all experts get the same. ``f`` has no gradient. A
token counts once for each sequence that it belongs to, so a prompt that two responses share counts twice, as it does
where it is laid twice; padding belongs to none.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nemo_lmpo.formats.architecture import Architecture, Experts
from nemo_lmpo.formats.nemo_experts import expert_keys
from nemo_lmpo.model.kernels import Kernels

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # megatron-core 0.16 reads the name, but defines it with Transformer Engine only


def expert_fields(architecture: Architecture, kernels: Kernels) -> dict[str, Any]:
    """megatron-core's settings of a mixture, by what the machine has; none for a dense model.

    No expert has a capacity, so no token is dropped. Routers compute in float32.
    """
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        **expert_keys(experts),  # NeMo has megatron-core's names
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": kernels.transformer_engine,
        "moe_permute_fusion": kernels.transformer_engine and _fused_permutation(),
    }


def _fused_permutation() -> bool:
    """Whether the installed Transformer Engine moves tokens to their experts in one kernel."""
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    needed = ("fused_permute", "fused_permute_with_probs", "fused_sort_chunks_by_index", "fused_unpermute")
    return all(getattr(extension, name, None) is not None for name in needed)


def use_balanced_routers(spec: ModuleSpec) -> None:
    """Give a layer's spec routers of this project; and its norm, fused with nothing, one name whatever the kernels."""
    mlp = spec.submodules.mlp
    # megatron-core 0.16 describes the layer by a spec, 0.19 by its class with arguments.
    submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    submodules.router = BalancedRouter
    names = dict(spec.submodules.sharded_state_dict_keys_map)
    names.pop("pre_mlp_layernorm.", None)
    spec.submodules.sharded_state_dict_keys_map = names


class BalancedRouter(TopKRouter):
    """megatron-core's router of a softmax and the largest ``K``, without its losses, with this project's term.

    Args and errors are those of the base class.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.load: RouterLoad | None = None
        """Counts, while somebody wants to know."""
        self.term: BalanceTerm | None = None
        """What is added to the loss, if anything."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Weights ``[T, E]`` and choices ``[T, E]`` bool of this rank's tokens.

        Args:
            logits: ``[T, 1, E]``.
            padding_mask: ``[T, S]`` bool, which sequences a token belongs to; megatron-core hands it through by
                this name, also where a layer is computed again.
            kwargs: of later versions.

        Communicates over the tensor- and context-parallel group, if the term is over sequences.
        """
        weights, chosen = super().routing(logits, **kwargs)
        if padding_mask is None or (self.load is None and self.term is None):
            return weights, chosen
        scores = torch.softmax(logits.reshape(-1, self.config.num_moe_experts).float(), dim=-1)
        if self.load is not None and not _in_backward():
            self.load.add(scores.detach(), chosen, padding_mask)
        if self.term is not None and self.training:
            term = self.term(scores, chosen, padding_mask, self.tp_cp_group)
            weights = _WithTerm.apply(weights, term)  # type: ignore[no-untyped-call]  # torch's
        return weights, chosen


def _in_backward() -> bool:
    """Whether a layer runs for the second time, because its activations were not kept."""
    return torch._C._current_graph_task_id() != -1  # as torch's own checkpoints ask


class _WithTerm(torch.autograd.Function):
    """Passes a tensor on, and lets a term's gradient flow that is not part of the loss's own graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, term: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = term.shape, term.dtype
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones(ctx.shape, dtype=ctx.dtype, device=gradients[0].device)


class RouterLoad:
    """What the tokens of a pass chose in a layer: sums over this rank's part of them."""

    def __init__(self, experts: Experts, device: torch.device) -> None:
        self.number = experts.number
        self.sums = torch.zeros(2 * experts.number + 2, dtype=torch.float64, device=device)
        """Choices by expert, softmax by expert, entropy, and tokens."""

    @torch.no_grad()
    def add(self, scores: Tensor, chosen: Tensor, membership: Tensor) -> None:
        """Count tokens ``[T]``, each once a sequence.

        Args:
            scores: softmax over all experts, ``[T, E]`` float32.
            chosen: ``[T, E]`` bool.
            membership: ``[T, S]`` bool.
        """
        counts = membership.sum(dim=1, dtype=torch.float64)
        entropy = -torch.xlogy(scores, scores).sum(dim=1).double()
        self.sums += torch.cat(
            [counts @ chosen.double(), counts @ scores.double(), (counts @ entropy)[None], counts.sum()[None]]
        )


class BalanceTerm:
    """What balancing adds to the loss in a layer.

    Args:
        coefficient: what the Switch Transformer's term is multiplied by.
        fractions: of choices by expert, ``[E]``, over the whole global batch; unset: of each sequence by itself.
        count: tokens of the global batch, each counted once a sequence; or sequences, where the term is over those.
    """

    def __init__(self, coefficient: float, fractions: Tensor | None, count: Tensor) -> None:
        self.coefficient, self.fractions, self.count = coefficient, fractions, count
        self.value = torch.zeros((), dtype=torch.float64, device=count.device)
        """This rank's part of the term so far."""

    def __call__(self, scores: Tensor, chosen: Tensor, membership: Tensor, group: Any) -> Tensor:
        """This rank's part of the term, a scalar; arguments are those of :meth:`RouterLoad.add`.

        Communicates over ``group``, if the term is over sequences: all of their tokens, on whatever rank.
        """
        belongs = membership.T.to(scores.dtype)
        if self.fractions is not None:
            balance = (belongs.sum(dim=0) @ scores) @ self.fractions.to(scores.dtype)
        else:
            counted = torch.cat([belongs @ chosen.to(scores.dtype), belongs.sum(dim=1, keepdim=True)], dim=1)
            if group.size() > 1:
                torch.distributed.all_reduce(counted, group=group)
            choices, tokens = counted[:, :-1], counted[:, -1:].clamp(min=1)
            fractions = choices / choices.sum(dim=1, keepdim=True).clamp(min=1)
            balance = ((belongs @ scores) * fractions / tokens).sum()
        term: Tensor = self.coefficient * scores.shape[1] * balance / self.count.to(scores.dtype)
        if not _in_backward():
            self.value += term.detach().double()
        return term


def routers_of(chunks: Iterable[nn.Module]) -> Iterator[tuple[int, BalancedRouter]]:
    """The routers of model chunks, each with its layer, counted from 0 over the whole model."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                yield int(module.layer_number) - 1, module


def is_expert(name: str) -> bool:
    """Whether a parameter of a model is an expert's."""
    return ".mlp.experts." in name


def mark_experts(chunk: nn.Module) -> None:
    """Let experts' weights count, and be summed, over the ranks that have them.

    Not the data-parallel ranks but those of the expert-data-parallel group hold the same expert, and each rank's part
    belongs in the gradient norm. megatron-core says so only where `expert_model_parallel_size` is above 1, which leaves
    out that whole experts lie on the ranks of tensor parallelism, and each of these computes other tokens.
    """
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    for name, parameter in chunk.named_parameters():
        if is_expert(name):
            parameter.allreduce = False  # type: ignore[attr-defined]
            if not getattr(parameter, "tensor_model_parallel", False):
                for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                    vars(parameter).pop(mark, None)
                set_tensor_model_parallel_attributes(parameter, True, 0 if "linear_fc1" in name else 1, 1)

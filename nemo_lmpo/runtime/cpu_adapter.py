"""Lets megatron-core, which takes CUDA for granted, run on CPU processes with gloo.

Install it only where no GPU is used. Everything it changes is put back by :meth:`CpuAdapter.uninstall`.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaToCpu(TorchFunctionMode):
    """Rewrites CUDA devices in torch calls to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping asserts on this name; the tensor itself stays where it is.
            return func(*args).replace("torch.", "torch.cuda.")
        if "device" in kwargs and (_is_cuda(kwargs["device"]) or isinstance(kwargs["device"], int)):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _nothing(*_: object) -> None:
    """CPU work is done when the call returns, and profiler ranges exist on GPUs only."""


_EVENT = SimpleNamespace(synchronize=_nothing, wait=_nothing)
_STREAM = SimpleNamespace(
    wait_stream=_nothing, wait_event=_nothing, synchronize=_nothing, record_event=lambda *_: _EVENT
)
_NVTX = SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=lambda *_: contextlib.nullcontext())


def _replacements() -> list[tuple[Any, str, Any]]:
    """Owner, name and replacement; a function object each, because torch.compile's tables refuse aliases."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core reports each missing GPU package
        # Decorates functions with torch.compile on import, which must not see the replacements.
        from megatron.core.tensor_parallel import random as megatron_random

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "set_device", lambda *args: None),
        (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        (torch.cuda, "current_stream", lambda *args, **kwargs: _STREAM),
        (torch.cuda, "Stream", lambda *args, **kwargs: _STREAM),
        (torch.cuda, "stream", lambda *args, **kwargs: contextlib.nullcontext()),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "nvtx", _NVTX),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (dist, "all_gather", _all_gather_of(dist.all_gather)),
        (dist, "reduce_scatter", _reduce_scatter_of(dist.reduce_scatter)),
        *_counts_on_the_host(),
        *_without_fused_optimizers(),
    ]


def _all_gather_of(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """All-gather where ranks have different sizes, as tokens of an expert are, which gloo refuses and NCCL takes."""

    def gather(tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({part.shape for part in tensors}) <= 1:
            return all_gather(tensors, tensor, group=group, async_op=async_op)
        tensors[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensors):
            dist.broadcast(part, group=group, group_src=rank)
        return None

    return gather


def _reduce_scatter_of(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """The same of a sum that is scattered."""

    def scatter(
        output: torch.Tensor,
        tensors: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in tensors}) <= 1:
            return reduce_scatter(output, tensors, op=op, group=group, async_op=async_op)
        for rank, part in enumerate(tensors):
            whole = part.clone()
            dist.all_reduce(whole, op=op, group=group)
            if rank == dist.get_rank(group):
                output.copy_(whole)
        return None

    return scatter


def _counts_on_the_host() -> list[tuple[Any, str, Any]]:
    """Sizes of all-to-alls as the lists that torch wants; megatron-core makes them of tensors of a GPU only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    return [(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)]


def _without_fused_optimizers() -> list[tuple[Any, str, Any]]:
    """Torch's AdamW and megatron-core's own norm, where Transformer Engine or apex gave it theirs for GPUs."""
    if not any(sys.modules.get(name) for name in ("transformer_engine", "apex")):
        return []
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as optimizers

    return [
        (optimizer, "Adam", torch.optim.AdamW),
        (optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm),
        *((module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale) for module in (clip_grads, optimizers)),
        *((module, "multi_tensor_applier", utils.local_multi_tensor_applier) for module in (clip_grads, optimizers)),
    ]


class CpuAdapter:
    """Redirects CUDA calls of torch and megatron-core to the CPU while installed."""

    def __init__(self) -> None:
        self._undo: contextlib.ExitStack | None = None

    @property
    def installed(self) -> bool:
        """Whether calls are redirected now."""
        return self._undo is not None

    def install(self) -> None:
        """Redirect; does nothing when installed already.

        Raises:
            RuntimeError: CUDA is in use in this process, which the adapter would break.
        """
        if self.installed:
            return
        if torch.cuda.is_initialized():
            raise RuntimeError("the CPU adapter cannot be installed after CUDA was initialised")
        replacements = _replacements()
        self._undo = contextlib.ExitStack()
        for owner, name, replacement in replacements:
            self._undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        self._undo.enter_context(_CudaToCpu())

    def uninstall(self) -> None:
        """Put everything back."""
        if self._undo is not None:
            self._undo.close()
            self._undo = None


ADAPTER = CpuAdapter()
"""The process's one adapter; torch's function modes nest, so there is never a second."""


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Install the adapter for a block (tests, tools); leaves it as it was before."""
    was_installed = ADAPTER.installed
    ADAPTER.install()
    try:
        yield
    finally:
        if not was_installed:
            ADAPTER.uninstall()

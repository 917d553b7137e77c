"""A job of any size in one process: collectives that do nothing, tensors without memory.

Fake CUDA tensors need a CUDA build of torch, so that the tensors are fake CPU tensors, which reach the engine through
the CPU adapter; what the program does only on GPUs is switched on by its own settings (:class:`Kernels`), and what
torch fuses on GPUs alone is replaced here by its fused form.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from nemo_lmpo.checkpoint.optimizer_state import inner_optimizers
from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.model import fully_sharded
from nemo_lmpo.model.kernels import Device, Kernels, choose_kernels
from nemo_lmpo.parallel.groups import ParallelGroups, destroy_groups
from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.trace.experts import expert_patches
from nemo_lmpo.trace.meter import Meter

COMPILED = {
    "megatron.core.fusions.fused_bias_swiglu": (
        *("swiglu", "swiglu_back", "bias_swiglu", "bias_swiglu_back", "weighted_swiglu", "weighted_swiglu_back"),
    ),
    "megatron.core.fusions.fused_bias_dropout": ("bias_dropout_add_fused_train", "bias_dropout_add_fused_inference"),
}
"""Functions that megatron-core gives to torch.compile, which makes one kernel of each."""

Patch = tuple[Any, str, Any]


@contextlib.contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Be ``rank`` of a job of ``world_size`` processes, none of which exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with on_cpu(), _patched(_world_patches()), torch.compiler.set_stance("force_eager"):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            yield
        finally:
            destroy_groups()


@contextlib.contextmanager
def measured(meter: Meter, *, transformer_engine: bool) -> Iterator[None]:
    """Everything in the block works on fake tensors as a GPU would, and the meter sees it.

    Args:
        meter: what measures.
        transformer_engine: with the rotary embedding that Transformer Engine fuses. Its linear layers keep for
            backward what a fused norm and a linear layer keep, so that megatron-core's own stand in for them.
    """
    with _patched(_kernel_patches(meter, transformer_engine)), meter.fake_mode, meter:
        yield


def names_of_groups(groups: ParallelGroups) -> dict[str, str]:
    """What the tables call the groups; where two are the same ranks, the first name stands."""
    named = {
        "tensor": groups.tensor,
        "pipeline": groups.pipeline,
        "context": groups.context,
        "data": groups.data_context,
        "replicas": groups.data,
        "expert": groups.expert,
        "expert tensor": groups.expert_tensor,
        "expert data": groups.expert_data,
    }
    result: dict[str, str] = {}
    for name, group in named.items():
        result.setdefault(group.group_name, name)
    return result


@contextlib.contextmanager
def _patched(patches: Sequence[Patch]) -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for owner, name, replacement in patches:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _world_patches() -> list[Patch]:
    """What a job without other processes cannot do as it is."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    new_group = dist.new_group

    def new_fake_group(*args: Any, backend: object = None, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs)

    def all_gather_object(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    @contextlib.contextmanager
    def fork(self: Any, *args: object) -> Iterator[None]:
        yield  # random states are values

    return [
        (dist, "new_group", new_fake_group),
        (dist, "all_gather_object", all_gather_object),
        (dist, "broadcast_object_list", lambda *args, **kwargs: None),
        (CudaRNGStatesTracker, "fork", fork),
    ]


def _kernel_patches(meter: Meter, transformer_engine: bool) -> list[Patch]:
    """Forms that only GPUs have, and that fake tensors of the CPU must not take apart."""

    def rms_norm(hidden: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Any:
        return _FusedRMSNorm.apply(hidden, weight, meter)  # type: ignore[no-untyped-call]  # torch's

    def rotary(states: Tensor, angles: Tensor, *_: object, **__: object) -> Any:
        return _FusedRotary.apply(states, angles, meter)  # type: ignore[no-untyped-call]  # torch's

    patches: list[Patch] = [
        # Nothing moves, and parameters cannot be exchanged for fake ones.
        (torch.nn.Module, "to", lambda self, *args, **kwargs: self),
        (importlib.import_module("nemo_lmpo.model.norm"), "rms_norm", rms_norm),
        *_sharding_patches(meter),
        *expert_patches(meter, transformer_engine),
    ]
    if transformer_engine:
        attention = importlib.import_module("megatron.core.transformer.attention")
        patches.append((attention, "apply_rotary_pos_emb", rotary))
    for path, names in COMPILED.items():
        module = importlib.import_module(path)
        patches += [(module, name, _fuse(meter, getattr(module, name))) for name in names]
    return patches


class _FusedRMSNorm(torch.autograd.Function):
    """One kernel each way, as on GPUs; keeps its input and one number a token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, meter: Meter) -> Tensor:
        ctx.meter = meter
        with meter.fused("rms_norm", (hidden, weight)):
            scale = torch.empty(hidden.shape[:-1], dtype=torch.float32)
            normalized = torch.empty_like(hidden)
        ctx.save_for_backward(hidden, weight, scale)
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, _ = ctx.saved_tensors
        with ctx.meter.fused("rms_norm_backward", (*gradients, hidden, weight)):
            return torch.empty_like(hidden), torch.empty_like(weight), None


class _FusedRotary(torch.autograd.Function):
    """One kernel each way; keeps nothing but the angles."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, angles: Tensor, meter: Meter) -> Tensor:
        ctx.meter, ctx.angles = meter, angles
        with meter.fused("rotary", (states, angles)):
            return torch.empty_like(states, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        with ctx.meter.fused("rotary_backward", (*gradients, ctx.angles)):
            return torch.empty_like(gradients[0]), None, None


def gpu_kernels(layout: ParallelLayout) -> Kernels:
    """What the run would choose on an A100 or newer, but for Transformer Engine's classes, which cannot be made here.

    Its attention computes the same products as torch's kernel, which stands in for it.
    """
    model = layout.config.model
    attention = "auto" if model.attention_backend == "te" else model.attention_backend
    return choose_kernels(
        replace(model, transformer_engine=False, attention_backend=attention),
        precision=layout.config.trainer.precision,
        head_dim=layout.architecture.head_dim,
        device=Device(gpu=True, name="A100", capability=(8, 0), flash=True),
    )


def add_gradients_in_place(chunks: Iterable[torch.nn.Module], meter: Meter) -> None:
    """Count linear layers' gradients as Transformer Engine adds them to the float32 buffer: inside of the product.

    The sum is read and written there, 8 bytes per weight, and megatron-core adds nothing by a kernel of its own.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def added(weight: Any) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            meter.work.moved["gradients"] += 8 * weight.numel()
            weight.grad_added_to_main_grad = True

        return count

    for chunk in chunks:
        for module in chunk.decoder.modules():  # type: ignore[union-attr]
            if isinstance(module, ColumnParallelLinear | RowParallelLinear) and module.weight.requires_grad:
                module.weight.register_hook(added(module.weight))


def use_gpu_form(optimizer: Any) -> None:
    """Let torch's AdamW step as it does on GPUs, in one kernel, as Transformer Engine's does."""
    for inner in inner_optimizers(optimizer):
        for group in inner.optimizer.param_groups:
            group["fused"] = True


def make_moments(optimizer: Any) -> None:
    """Make the state that the first step would make: what follows is any later step."""
    for inner in inner_optimizers(optimizer):
        inner.init_state_fn(inner.optimizer, inner.config)
        for state in inner.optimizer.state.values():
            state.setdefault("step", torch.zeros(()))


def _sharding_patches(meter: Meter) -> list[Patch]:
    """FSDP resizes memory behind operators' backs, and asks for shapes by running operators on wholes."""
    parameters = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    group = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def resizing(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def resize(tensor: Tensor) -> None:
            function(tensor)
            meter.resized(tensor)

        return resize

    def propagate_unseen(self: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return propagate(self, schema)

    return [
        (fully_sharded, "mesh_of", _real_mesh),
        # Which of the two modules uses which of the two functions depends on torch's version.
        *(
            (module, name, resizing(getattr(module, name)))
            for module in (parameters, group)
            for name in ("alloc_storage", "free_storage")
            if hasattr(module, name)
        ),
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_unseen),
    ]


def _real_mesh(group: dist.ProcessGroup, device_type: str) -> DeviceMesh:
    """The ranks of a mesh are values, which fake tensors have none of."""
    with _disable_current_modes():
        return DeviceMesh.from_group(group, device_type)


def _fuse(meter: Meter, function: Callable[..., Any]) -> Callable[..., Any]:
    name = getattr(function, "__name__", "fused")

    def fused(*args: Any, **kwargs: Any) -> Any:
        with meter.fused(name, (args, kwargs)):
            return function(*args, **kwargs)

    return fused

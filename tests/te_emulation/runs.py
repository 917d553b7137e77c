"""What runs in the workers of these tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.training_runs import COMMON, train


def train_local(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]) -> None:
    """On megatron-core's own layers and torch's AdamW, as a CPU run does."""
    train(launch, run_dir, overrides)


def train_te(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], fault: str | None = None) -> dict[str, int]:
    """On what an H100 run takes, perhaps with one of :data:`FAULTS`; how often each operation of the stand-in ran."""
    from tests.te_emulation.extension import CALLS

    with as_on_a_gpu() as patch:
        if fault is not None:
            FAULTS[fault](patch)
        train(launch, run_dir, overrides)
        return dict(CALLS)


@contextmanager
def as_on_a_gpu() -> Iterator[pytest.MonkeyPatch]:
    """Let a run in this process choose and build what it would on an H100, Transformer Engine's optimizer included."""
    from nemo_lmpo.model import mixture
    from nemo_lmpo.model.kernels import Device
    from nemo_lmpo.runtime import cpu_adapter
    from nemo_lmpo.training import policy
    from tests.flash_reference import flash_on_cpu

    h100 = Device(gpu=True, name="H100 of the emulation", capability=(9, 0), flash=True, cuda=(12, 9))
    with flash_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "this_device", lambda *, use_cuda: h100)
        patch.setattr(cpu_adapter, "_without_fused_optimizers", list)
        patch.setattr(mixture, "_fused_permutation", lambda: False)  # kernels in Triton, which need a GPU
        patch.setattr(dist, "is_backend_available", lambda _: True)
        for name in ("new_group", "new_subgroups_by_enumeration"):
            patch.setattr(dist, name, _on_gloo(getattr(dist, name)))
        yield patch


def _on_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_groups(*arguments: Any, backend: object = None, **named: Any) -> Any:
        return make(*arguments, backend="gloo" if backend == "nccl" else backend, **named)

    return make_groups


@contextmanager
def session_on_te(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]) -> Iterator[Any]:
    """A session at step 0."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", *overrides])
    with as_on_a_gpu(), open_session(config, launch) as session:
        yield session


def _after_building(patch: pytest.MonkeyPatch, change: Callable[[str, Any], None]) -> None:
    """Call ``change`` with the name of every parameter and the parameter, once the policy is built."""
    from nemo_lmpo.training.policy import Policy

    build = Policy.__init__

    def build_and_change(policy: Policy, *arguments: Any, **named: Any) -> None:
        build(policy, *arguments, **named)
        for model in policy.models:
            for name, parameter in model.named_parameters():
                change(name, parameter)

    patch.setattr(Policy, "__init__", build_and_change)


def _norms_without_their_mark(patch: pytest.MonkeyPatch) -> None:
    def unmark(name: str, parameter: Any) -> None:
        if "layer_norm_weight" in name:
            parameter.sequence_parallel = False

    _after_building(patch, unmark)


def _gradients_added_again(patch: pytest.MonkeyPatch) -> None:
    """megatron-core adds what backward gives, too, as if it had not been told of the addition in place."""

    def forget(name: str, parameter: Any) -> None:
        if parameter.requires_grad:
            parameter.register_hook(lambda _: setattr(parameter, "grad_added_to_main_grad", False))

    _after_building(patch, forget)


def _adapters_on_what_is_not_normed(patch: pytest.MonkeyPatch) -> None:
    from nemo_lmpo.model.lora import LinearAdapter

    patch.setattr(LinearAdapter, "_normed", lambda adapter, hidden: hidden)


def _adapters_without_their_mark(patch: pytest.MonkeyPatch) -> None:
    def unmark(name: str, parameter: Any) -> None:
        if "lora_" in name:
            parameter.sequence_parallel = False

    _after_building(patch, unmark)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "norms without their mark": _norms_without_their_mark,
    "gradients added again": _gradients_added_again,
    "adapters on what is not normed": _adapters_on_what_is_not_normed,
    "adapters without their mark": _adapters_without_their_mark,
}
"""What could go wrong between the project and Transformer Engine."""


def accumulate(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Main gradients of the first step's pairs: added in place, added on top of themselves, and by megatron-core.

    With them how many products added in place each time, how many linear layers and how many micro-batches there are.
    """
    from tests.te_emulation.extension import CALLS

    found: dict[str, Any] = {}

    def look(name: str, *, clear: bool = True) -> None:
        before = CALLS.get(IN_PLACE, 0)
        if clear:
            policy.prepare_for_training_step()
        policy.run_batch(batch, forward_only=False)
        gradients = {name: parameter.main_grad.clone().numpy() for name, parameter in model.named_parameters()}
        found[name] = gradients, CALLS.get(IN_PLACE, 0) - before

    with session_on_te(launch, run_dir, overrides) as session:
        policy = session.policy
        (model,) = policy.models
        batch = session.steps.builder.build(session.data.train, session.steps.sampler.pairs_of_step(0))
        found["micro_batches"] = len(batch.micro_batches)
        linears = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
        found["linears"] = sum(module.fuse_wgrad_accumulation for module in linears)
        look("fused")
        look("twice", clear=False)
        for module in linears:
            module.fuse_wgrad_accumulation = False
        look("unfused")
    return found


IN_PLACE = "gemm_accumulated"


class OnHost(torch.Tensor):
    """A tensor that would be in the host's memory, and so would be what is made of it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In checkpoints it is a plain one."""
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


class _Stream:
    """Copies are done when they return."""

    def wait_stream(self, _: object) -> None:
        """Nothing is under way."""

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        """As above."""

    def wait(self, *_: object) -> None:
        """As above."""


def train_offloaded(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]) -> tuple[int, int]:
    """As on a GPU, with the optimizer on the host: its parameters are on a GPU until they are copied and pinned.

    How many parameters were stepped on the host and how many on the GPU, over all steps.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer.cpu_offloading import hybrid_optimizer

    stepped = [0, 0]
    step = hybrid_optimizer.HybridDeviceOptimizer.step

    def count_and_step(hybrid: Any, closure: Any = None) -> Any:
        stepped[0] += len(hybrid.cpu_optimizers)
        stepped[1] += hybrid.gpu_optimizer is not None
        return step(hybrid, closure)

    def on_gpu(tensor: torch.Tensor) -> bool:
        asking = sys._getframe(1).f_globals["__name__"]
        if asking == hybrid_optimizer.__name__:
            return not isinstance(tensor, OnHost)
        return bool(asking.startswith("transformer_engine."))

    with as_on_a_gpu() as patch:
        patch.setattr(optimizer, "OptimizerConfig", partial(optimizer.OptimizerConfig, pin_cpu_grads=False))
        patch.setattr(hybrid_optimizer.HybridDeviceOptimizer, "step", count_and_step)
        patch.setattr(torch.Tensor, "is_cuda", property(on_gpu))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone().as_subclass(OnHost))
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        train(launch, run_dir, ("optim.cpu_offload=true", *overrides))
    return stepped[0], stepped[1]


def train_by_hand(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], kind: str) -> None:
    """On megatron-core's own layers, whose products are in FP8 by its definition."""
    from tests.te_emulation.fp8_by_hand import products_in_fp8

    with products_in_fp8(kind):
        train(launch, run_dir, overrides)


def gradients(
    launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], by_hand: str | None = None
) -> dict[str, Any]:
    """Main gradients of the first step's pairs on Transformer Engine's layers, or on those of :func:`train_by_hand`."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session
    from tests.te_emulation.fp8_by_hand import products_in_fp8

    config = load_recipe("lmpo_tiny", [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", *overrides])
    on = as_on_a_gpu() if by_hand is None else products_in_fp8(by_hand)
    with on, open_session(config, launch) as session:
        batch = session.steps.builder.build(session.data.train, session.steps.sampler.pairs_of_step(0))
        session.policy.prepare_for_training_step()
        session.policy.run_batch(batch, forward_only=False)
        (model,) = session.policy.models
        return {_name(name): parameter.main_grad.clone().numpy() for name, parameter in model.named_parameters()}


def _name(of_parameter: str) -> str:
    """As on megatron-core's own layers, which keep norms beside the linear layers."""
    for inside, beside in (
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    ):
        of_parameter = of_parameter.replace(inside, beside)
    return of_parameter


def linear_in_fp8(launch: LaunchInfo, kind: str) -> tuple[list[Any], list[Any]]:
    """Output and gradients of Transformer Engine's linear layer with megatron-core's recipe of ``kind``; by hand."""
    from types import SimpleNamespace

    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine import pytorch as te

    from nemo_lmpo.model.build import FP8
    from nemo_lmpo.runtime.cpu_adapter import on_cpu
    from tests.te_emulation.fp8_by_hand import in_fp8

    torch.manual_seed(0)
    # Columns of very different sizes, so that scales of blocks and of the whole differ.
    states = (torch.randn(1, 256, 384) * torch.logspace(-3, 3, 384)).bfloat16()
    upstream = torch.randn(1, 256, 128).bfloat16()
    recipe = SimpleNamespace(**FP8[kind], fp8_dot_product_attention=False)
    with on_cpu(), as_on_a_gpu():
        layer = te.Linear(384, 128, bias=False, params_dtype=torch.bfloat16, device="cpu")
        weight = layer.weight.detach().clone().requires_grad_()
        first, second = states.clone().requires_grad_(), states.clone().requires_grad_()
        with te.fp8_autocast(enabled=True, fp8_recipe=get_fp8_recipe(recipe)):
            found = layer(first)
        found.backward(upstream)
        expected = in_fp8(second, weight, kind)
        expected.backward(upstream)
        pairs: Any = ((found, expected), (first.grad, second.grad), (layer.weight.grad, weight.grad))
    mine, by_hand = ([tensor.detach().float().numpy() for tensor in part] for part in zip(*pairs, strict=True))
    return mine, by_hand


def train_on_userbuffers(
    launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]
) -> list[tuple[list[int], int, int]]:
    """Shape, bytes of a number and ranks of each buffer that training asked for."""
    from tests.te_emulation.userbuffers import ASKED

    train_te(launch, run_dir, overrides)
    return [(shape, dtype.itemsize, ranks) for shape, dtype, ranks in ASKED]

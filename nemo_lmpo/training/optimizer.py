"""Data-parallel wrapping, AdamW and the learning-rate schedule, all megatron-core's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from nemo_lmpo.checkpoint.optimizer_state import inner_optimizers
from nemo_lmpo.config.schema import Config, OptimConfig
from nemo_lmpo.model.build import parameter_dtype
from nemo_lmpo.model.fully_sharded import ShardedDataParallel
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.multi_tensor import replace_fallbacks
from nemo_lmpo.training.rounded_moments import RoundedMomentsAdamW

if TYPE_CHECKING:
    from megatron.core.distributed.data_parallel_base import _BaseDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def wrap_data_parallel(
    chunks: list[PackedGPTModel], config: Config, groups: ParallelGroups, device: torch.device
) -> list[_BaseDataParallel]:
    """Let data- and context-parallel ranks share the chunks' gradients, and with `model.fsdp` all the rest."""
    if config.model.fsdp:
        return [ShardedDataParallel(chunk, groups.data_context, device) for chunk in chunks]
    return wrap_replicas(chunks, config.optim)


def wrap_replicas(chunks: list[PackedGPTModel], optim: OptimConfig) -> list[_BaseDataParallel]:
    """Give each chunk a float32 gradient buffer that is summed over data- and context-parallel ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=optim.overlap_grad_reduce,
        overlap_param_gather=optim.overlap_param_gather,
        use_distributed_optimizer=optim.use_distributed_optimizer,
    )
    config = chunks[0].config
    wrapped = [
        # Only the first chunk's gradients come last in backward, so only it gains from several buckets.
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        fuse_gradient_accumulation(chunk)
    if optim.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    if optim.overlap_param_gather:
        for chunk in wrapped:
            # The head reads the output matrix outside of any module's forward, before which megatron-core waits.
            chunk.register_forward_hook(lambda chunk, *_: gather_weights([chunk]))
    return wrapped


def gather_weights(chunks: Iterable[Any]) -> None:
    """Wait for weights that are gathered behind forward, and begin where none has (`optim.overlap_param_gather`).

    Whoever reads weights outside of forward after a step, to save them, calls it first. Communicates over the data-
    and context-parallel group, if it is the first to read.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in chunk.bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def fuse_gradient_accumulation(chunk: torch.nn.Module) -> None:
    """Let Transformer Engine's matrices add their gradients to the float32 buffer inside the matrix product.

    Not by megatron-core's `gradient_accumulation_fusion`: that wants apex for the output layer too, whose gradient
    the head adds up itself.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def build_optimizer(chunks: Iterable[Any], config: Config) -> MegatronOptimizer:
    """AdamW with float32 main parameters: Transformer Engine's or apex's on GPUs that have one, else torch's.

    With `optim.moments_dtype=bf16` this project's takes its place (:mod:`nemo_lmpo.training.rounded_moments`).
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    replace_fallbacks()
    optim = config.optim
    # Sharded weights are float32, and so their own main parameters.
    dtype = torch.float32 if config.model.fsdp else parameter_dtype(config.trainer)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.sched.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            clip_grad=config.trainer.gradient_clip_val,
            # Parts of weights have parts of a plain optimizer's state.
            use_distributed_optimizer=optim.use_distributed_optimizer and not config.model.fsdp,
            overlap_param_gather=optim.overlap_param_gather,
            # With main parameters on the host, too: this leaves none on the GPU.
            use_precision_aware_optimizer=optim.cpu_offload,
            optimizer_cpu_offload=optim.cpu_offload,
            optimizer_offload_fraction=1.0,
            overlap_cpu_optimizer_d2h_h2d=True,
        ),
        list(chunks),
        use_gloo_process_groups=False,
    )
    for inner in inner_optimizers(optimizer):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        if optim.moments_dtype == "bf16":
            _round_moments(inner, optim)
        if optim.cpu_offload:
            # A step with gradients of no meaning, whose results a checkpoint writes over.
            inner.init_state_fn = lambda optimizer, _=None: None if optimizer.state else optimizer.dummy_step()
        _use_one_kernel(inner)
    if config.model.fsdp:
        _make_parts_of_moments(optimizer)
    return optimizer


def _round_moments(inner: Any, optim: OptimConfig) -> None:
    """Put the AdamW with bfloat16 moments in the place of the one that megatron-core made, with its groups."""
    inner.optimizer = RoundedMomentsAdamW(
        inner.optimizer.param_groups,
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    inner.init_state_fn = lambda optimizer, _=None: optimizer.make_moments()


def _use_one_kernel(inner: Any) -> None:
    """Let torch's AdamW step in one kernel on GPUs, where its default takes 4 bytes per parameter for itself."""
    if isinstance(inner.optimizer, torch.optim.AdamW | RoundedMomentsAdamW):
        for group in inner.optimizer.param_groups:
            if all(parameter.is_cuda for parameter in group["params"]):
                group["fused"] = True


def _make_parts_of_moments(optimizer: MegatronOptimizer) -> None:
    """Make a fused optimizer's moments parts like the weights; versions of Transformer Engine would make them whole."""
    for inner in inner_optimizers(optimizer):
        if not isinstance(inner.optimizer, torch.optim.AdamW):
            inner.init_state_fn(inner.optimizer, inner.config)


def build_scheduler(optimizer: MegatronOptimizer, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then the configured decay to `min_lr` at the last step.

    A warm-up that would take every step of a very short run leaves the last one.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.sched.min_lr,
        lr_warmup_steps=min(math.ceil(optim.sched.warmup_fraction * total_steps), total_steps - 1),
        lr_decay_steps=total_steps,
        lr_decay_style=optim.sched.name,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def current_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the next step (ranks without parameters of their own have it too)."""
    return float(max((group["lr"] for group in optimizer.param_groups), default=math.nan))


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the main gradients ready and return their L2 norm over the whole model.

    Communicates over the model-parallel group.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def clip_and_step(optimizer: MegatronOptimizer, norm: float, max_norm: float) -> None:
    """Scale ready gradients down to ``max_norm`` (0: never) and update the parameters."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    if max_norm > 0:
        for inner in inner_optimizers(optimizer):
            parameters = inner.get_parameters()
            if parameters:
                decoupled = inner.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, max_norm, norm, use_decoupled_grad=decoupled)
    optimizer.step_with_ready_grads()

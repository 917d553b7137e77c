"""Rules about settings that save memory or time: what each needs, and where it has no effect (docs/flags.md)."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_lmpo.config.rules.layout import ParallelLayout
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import shown

FP8_MULTIPLES = {"hybrid": 16, "tensorwise": 16, "blockwise": 128}
"""What the sizes of a product in FP8 divide by: cuBLAS' alignment, or the sides of blocks."""


def recompute_modules(config: Config) -> Iterator[str]:
    """Modules are recomputed where that is chosen, and then there are some."""
    model = config.model
    plain = type(model)().recompute_modules
    if model.recompute_modules != plain and model.activations_checkpoint_granularity != "selective":
        yield (
            f"model.recompute_modules={shown(model.recompute_modules)} has no effect without "
            f"model.activations_checkpoint_granularity=selective; set that too, or leave it at {shown(plain)}"
        )
    if not model.recompute_modules:
        yield "model.recompute_modules=[] names no module; give mlp or core_attn"


def overlap_param_gather(config: Config) -> Iterator[str]:
    """Weights are gathered behind forward where replicas share the optimizer's work, by megatron-core's own means."""
    optim, model = config.optim, config.model
    if not optim.overlap_param_gather:
        return
    if not (optim.use_distributed_optimizer and optim.overlap_grad_reduce):
        yield (
            "optim.overlap_param_gather=true needs optim.use_distributed_optimizer=true and "
            "optim.overlap_grad_reduce=true; set both, or leave it false"
        )
    if model.fsdp:
        yield (
            "optim.overlap_param_gather=true has no effect with model.fsdp=true, which gathers ahead anyway; remove it"
        )
    if model.peft.name is not None:
        yield (
            f"optim.overlap_param_gather=true does not go with model.peft.name={model.peft.name}, whose few weights "
            f"are gathered at once; remove it"
        )


def fp8(config: Config) -> Iterator[str]:
    """FP8 products are of Transformer Engine's linear layers on BF16 states, with whole weights that are trained."""
    model, wanted = config.model, config.model.fp8
    if wanted is None:
        return
    if config.trainer.precision != "bf16":
        yield (
            f"model.fp8={wanted} needs trainer.precision=bf16, not {config.trainer.precision}; set it, or unset "
            f"model.fp8"
        )
    if model.transformer_engine is False:
        yield (
            f"model.fp8={wanted} is of Transformer Engine's layers, and model.transformer_engine=false; "
            f"unset one of them"
        )
    for key, on in (("model.fsdp=true", model.fsdp), (f"model.peft.name={model.peft.name}", bool(model.peft.name))):
        if on:
            yield f"model.fp8={wanted} was not tried with {key}; unset one of them"


def fp8_sizes(layout: ParallelLayout) -> Iterator[str]:
    """A rank's matrices divide into what FP8 kernels take."""
    model, shape = layout.config.model, layout.architecture
    if model.fp8 is None:
        return
    multiple, tensor = FP8_MULTIPLES[model.fp8], model.tensor_model_parallel_size
    query = shape.num_attention_heads * shape.head_dim
    for what, size in (
        ("hidden_size", shape.hidden_size),
        ("intermediate_size over tensor parallelism", shape.ffn_hidden_size // tensor),
        ("heads' width over tensor parallelism", query // tensor),
        ("queries', keys' and values' width", (query + 2 * shape.num_query_groups * shape.head_dim) // tensor),
    ):
        if size % multiple:
            yield (
                f"model.fp8={model.fp8} takes matrices whose sizes divide by {multiple}, and the model's {what} is "
                f"{size}; unset model.fp8, or choose another model.tensor_model_parallel_size"
            )


def tp_comm_overlap(config: Config) -> Iterator[str]:
    """Collectives run inside of products where the sequence is split over ranks, with one length of all rows."""
    model = config.model
    if not model.tp_comm_overlap:
        return
    if not model.sequence_parallel:
        yield (
            "model.tp_comm_overlap=true needs model.sequence_parallel=true; set it, or leave model.tp_comm_overlap "
            "false"
        )
    if config.trainer.precision != "bf16" or model.transformer_engine is False:
        yield (
            "model.tp_comm_overlap=true is of Transformer Engine's layers in BF16; set trainer.precision=bf16 and "
            "leave model.transformer_engine unset"
        )
    for key, on in (("model.fsdp=true", model.fsdp), (f"model.peft.name={model.peft.name}", bool(model.peft.name))):
        if on:
            yield f"model.tp_comm_overlap=true was not tried with {key}; unset one of them"
    if model.fp8 == "blockwise":
        yield "model.tp_comm_overlap=true does not go with model.fp8=blockwise; choose hybrid or tensorwise"
    if config.logging.samples:
        yield (
            f"model.tp_comm_overlap=true needs one length of all rows, and logging.samples={config.logging.samples} "
            f"answers of growing length; set one of them to its default"
        )


def cpu_offload(config: Config) -> Iterator[str]:
    """The optimizer's state goes to the host where megatron-core holds it in one place: the distributed optimizer."""
    optim, model = config.optim, config.model
    if not optim.cpu_offload:
        return
    if not optim.use_distributed_optimizer or model.fsdp:
        yield (
            "optim.cpu_offload=true needs optim.use_distributed_optimizer=true and model.fsdp=false; set them (one "
            "replica is enough), or leave optim.cpu_offload false"
        )
    if config.trainer.precision != "bf16":
        yield (
            f"optim.cpu_offload=true needs trainer.precision=bf16, not {config.trainer.precision}; set it, or remove it"
        )
    if optim.moments_dtype != "32":
        yield (
            f"optim.cpu_offload=true keeps float32 moments in the host's memory, so that optim.moments_dtype="
            f"{optim.moments_dtype} has no effect; remove one of them"
        )
    if model.peft.name is not None:
        yield f"optim.cpu_offload=true frees next to nothing with model.peft.name={model.peft.name}; remove it"


def dense_models(layout: ParallelLayout) -> Iterator[str]:
    """What was tried with models without experts only."""
    model, optim = layout.config.model, layout.config.optim
    if layout.architecture.experts is None:
        return
    recomputed = model.activations_checkpoint_granularity == "selective" and "mlp" in model.recompute_modules
    for key, on in (
        (f"model.fp8={model.fp8}", model.fp8 is not None),
        ("model.tp_comm_overlap=true", model.tp_comm_overlap),
        ("optim.overlap_param_gather=true", optim.overlap_param_gather),
        ("optim.cpu_offload=true", optim.cpu_offload),
        ("model.recompute_modules with mlp", recomputed),
    ):
        if on:
            yield f"{key} was not tried with a mixture of experts; remove it"

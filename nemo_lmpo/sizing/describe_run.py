"""What a run would look like and need, without running it: layout, batches, memory per rank in GiB."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import counted
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.sizing.host_memory import background_bytes, foreground_bytes, offloaded_bytes
from nemo_lmpo.sizing.memory import estimate_memory


def describe(layout: ParallelLayout, unseen: Sequence[str] = (), rows: Sequence[str] = ()) -> str:
    """The dry run's text.

    Args:
        layout: the run.
        unseen: hub names that only a start can look at.
        rows: lines on the first rows of the data.
    """
    config, model = layout.config, layout.config.model
    memory = estimate_memory(layout)
    nodes = f"{counted(config.trainer.num_nodes, 'node')} x {counted(config.trainer.devices, 'device')}"
    facts = [
        ("recipe", config.name),
        ("loss", config.loss.name),
        ("processes", f"{layout.world_size} ({nodes})"),
        (
            "layout",
            str(layout) + (", sequence parallel" if model.sequence_parallel else "") + _shared(config),
        ),
        ("precision", config.trainer.precision),
        ("recompute", model.activations_checkpoint_granularity or "none"),
        ("parameters", f"{layout.architecture.num_parameters():,}" + _active(layout.architecture)),
        (
            "global batch",
            f"{model.global_batch_size} pairs, {model.global_batch_size // layout.data_parallel_size} per replica",
        ),
        ("row", f"at most {config.data.row_budget} tokens"),
    ]
    kept = ["parameters", "gradients", "optimizer", "activations", "logits"]
    kept += [name for name in ("gathered", "reference") if getattr(memory, name)]
    table = [*((name, getattr(memory, name)) for name in kept), ("total", memory.total)]
    lines = [f"{name:<13} {value}" for name, value in facts]
    lines += ["", "memory expected on the busiest rank, GiB"]
    lines += [f"  {name:<12} {amount / GIB:8.2f}" for name, amount in table]
    behind, waiting = background_bytes(layout) / GIB, foreground_bytes(layout) / GIB
    lines += [
        "",
        f"pinned memory of a node to save from GPUs: {behind:.1f} GiB in the background, {waiting:.1f} GiB while "
        f"training waits (checkpoint.async_save={str(config.checkpoint.async_save).lower()})",
    ]
    if config.optim.cpu_offload:
        lines.append(f"the optimizer in the host's memory of a node: {offloaded_bytes(layout) / GIB:.1f} GiB")
    if rows:
        lines += ["", "the first rows of the data, as the chat template renders them", *rows]
    lines += ["", "The configuration is valid. Nothing was started."]
    if unseen:
        lines.append(f"Not looked at, as they are not on this machine: {', '.join(unseen)}.")
    return "\n".join(lines)


def _active(architecture: Architecture) -> str:
    return "" if architecture.experts is None else f", {architecture.num_active_parameters():,} active"


def _shared(config: Config) -> str:
    """What replicas share."""
    if config.model.fsdp:
        return ", FSDP"
    return ", distributed optimizer" if config.optim.use_distributed_optimizer else ""

"""The text of `dry_run=plan`."""

from __future__ import annotations

from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import counted
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.sizing.cards import Machine
from nemo_lmpo.sizing.rank_work import further_passes
from nemo_lmpo.sizing.search import Candidate, model_flops, rank_layouts
from nemo_lmpo.sizing.typical_pairs import LENGTHS, step_rows

SHOWN = 10


def describe_plan(config: Config, architecture: Architecture, machine: Machine) -> str:
    """Layouts that fit, fastest first, with memory, time of a step and what makes a recipe of the first."""
    candidates = rank_layouts(config, architecture, machine)
    card = machine.card
    lines = [
        f"{config.name}: {architecture.num_parameters() / 1e9:.2f} B parameters{_active(architecture)} on "
        f"{machine.gpus} x {card.name}, "
        f"{counted(machine.nodes, 'node')} of {card.node}; {config.model.global_batch_size} pairs per step, {LENGTHS}",
        *(f"with one more forward pass per step, for {what}" for what in further_passes(config)),
        "",
        f"  {'layout':<34} {'row':>6} {'rows':>5} {'GiB':>6} {'step s':>8} {'pairs/s':>8} {'MFU':>5}  time goes to",
    ]
    lines += [_line(candidate, machine) for candidate in candidates[:SHOWN]]
    if len(candidates) > SHOWN:
        lines.append(f"  and {len(candidates) - SHOWN} slower ones that fit")
    nodes = [f"trainer.devices={card.node}"] + ([f"trainer.num_nodes={machine.nodes}"] if machine.nodes > 1 else [])
    lines += [
        "",
        "the first:",
        "  " + " ".join(nodes + candidates[0].overrides()),
        "",
        "Computed from sizes and a card's figures, not measured; docs/performance.md says how far to trust it.",
    ]
    return "\n".join(lines)


def _active(architecture: Architecture) -> str:
    """How many of a mixture's parameters a token meets."""
    if architecture.experts is None:
        return ""
    return f" ({architecture.num_active_parameters() / 1e9:.2f} B active)"


def _line(candidate: Candidate, machine: Machine) -> str:
    time = candidate.time
    mfu = model_flops(candidate) / (time.total * machine.gpus * machine.card.peak)
    data = candidate.layout.config.data
    rows, _ = step_rows(candidate.layout.config, candidate.layout.data_parallel_size)
    parts = {
        "host launches" if time.host_bound else "kernels": time.compute,
        "collectives": time.communicate,
        "bubble": time.bubble,
        "replicas": time.reduce,
        "optimizer": time.optimizer,
    }
    shares = ", ".join(
        f"{name} {100 * part / time.total:.0f} %" for name, part in parts.items() if part > 0.005 * time.total
    )
    return (
        f"  {layout_name(candidate):<34} {data.row_budget:>6} {rows:>5} {candidate.memory / GIB:>6.1f} "
        f"{time.total:>8.2f} {candidate.pairs_per_second:>8.1f} {100 * mfu:>4.0f}%  {shares}"
    )


def layout_name(candidate: Candidate) -> str:
    """For example `TP 2 x PP 4 (VPP 2) x DP 8, recomputed`, `TP 1 x DP 8, FSDP`."""
    model = candidate.layout.config.model
    virtual = (
        f" (VPP {model.virtual_pipeline_model_parallel_size})" if model.virtual_pipeline_model_parallel_size else ""
    )
    sizes = [("TP", model.tensor_model_parallel_size, ""), ("PP", model.pipeline_model_parallel_size, virtual)]
    sizes += [("CP", model.context_parallel_size, ""), ("DP", candidate.layout.data_parallel_size, "")]
    sizes += [("EP", model.expert_model_parallel_size, "")]
    named = [f"{name} {size}{more}" for name, size, more in sizes if size > 1 or name == "TP"]
    recomputed = ", recomputed" if model.activations_checkpoint_granularity == "full" else ""
    return " x ".join(named) + (", FSDP" if model.fsdp else "") + recomputed

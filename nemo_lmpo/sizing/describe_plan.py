"""The text of `dry_run=plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import counted
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.sizing.cards import GIGABIT, Machine
from nemo_lmpo.sizing.choice import contenders, dependence
from nemo_lmpo.sizing.rank_work import further_passes, split_of
from nemo_lmpo.sizing.search import Candidate, model_flops, rank_layouts
from nemo_lmpo.sizing.step_time import hides_nothing
from nemo_lmpo.sizing.typical_rows import assumption, step_rows, typical_row
from nemo_lmpo.sizing.uncertainty import NETWORK, shares

SHOWN = 10


def describe_plan(config: Config, architecture: Architecture, machine: Machine) -> str:
    """Layouts that fit, fastest first, with memory, a step's time and range, and what makes a recipe of the first."""
    candidates = rank_layouts(config, architecture, machine)
    card = machine.card
    kind = typical_row(config).kind
    places = {id(each): place for place, each in enumerate(sorted(candidates, key=lambda each: each.slow), 1)}
    lines = [
        f"{config.name}: {architecture.num_parameters() / 1e9:.2f} B parameters{_active(architecture)} on "
        f"{machine.gpus} x {card.name}, "
        f"{counted(machine.nodes, 'node')} of {card.node}; {config.model.global_batch_size} {kind} per step",
        f"assumed: {assumption(config)}",
        *(f"with one more forward pass per step, for {what}" for what in further_passes(config)),
        *_network(machine),
        "",
        f"  {'layout':<34} {'row':>6} {'rows':>5} {'GiB':>6} {'step s':>8} "
        f"{_rate(kind):>{len(_rate(kind)) + 1}} {'MFU':>5}  {'fast to slow':>13} {'if slow':>7}  "
        f"{'decided by':<38}  time goes to",
    ]
    lines += [_line(candidate, machine, places[id(candidate)]) for candidate in candidates[:SHOWN]]
    if len(candidates) > SHOWN:
        lines.append(f"  and {len(candidates) - SHOWN} slower ones that fit")
    lines += _notes(candidates[:SHOWN], machine)
    lines += ["", "which layout is first depends on"]
    lines += [f"  {line}" for line in dependence(contenders(candidates), machine, layout_name)]
    lines += ["", "the first:", "  " + _overrides(candidates[0], machine)]
    safest = min(candidates, key=lambda each: each.slow)
    if safest is not candidates[0]:
        told = f"{layout_name(safest)}, {safest.slow:.2f} s against {candidates[0].slow:.2f}"
        lines += ["", f"the first at the slow end ({told}):", "  " + _overrides(safest, machine)]
    lines += [
        "",
        "Computed from sizes and a card's figures, not measured; docs/performance.md says how far to trust it.",
    ]
    return "\n".join(lines)


def _active(architecture: Architecture) -> str:
    """How many of a mixture's parameters a token meets."""
    if architecture.experts is None:
        return ""
    return f" ({architecture.num_active_parameters() / 1e9:.2f} B active)"


def _network(machine: Machine) -> list[str]:
    if machine.nodes == 1:
        return []
    usual = machine.card.network / GIGABIT
    if machine.network_is_known:
        return [f"network: {usual:.0f} Gbit/s a GPU"]
    return [f"network: {usual:.0f} Gbit/s a GPU, at the slow end {NETWORK[0] * usual:.0f}; name yours: GPUS=...-200g"]


def _overrides(candidate: Candidate, machine: Machine) -> str:
    nodes = [f"trainer.num_nodes={machine.nodes}"] if machine.nodes > 1 else []
    return " ".join([f"trainer.devices={machine.card.node}", *nodes, *candidate.overrides()])


def _rate(kind: str) -> str:
    return f"{kind}/s"


def _notes(shown: Sequence[Candidate], machine: Machine) -> list[str]:
    if any(hides_nothing(split_of(candidate.layout), machine.card) for candidate in shown):
        return [
            "  FSDP with TP before Blackwell: Megatron-LM warns that TP wants CUDA_DEVICE_MAX_CONNECTIONS=1 and FSDP",
            "  more; nothing of TP's collectives is counted as hidden there",
        ]
    return []


def _line(candidate: Candidate, machine: Machine, place: int) -> str:
    time = candidate.time
    mfu = model_flops(candidate) / (time.total * machine.gpus * machine.card.peak)
    data = candidate.layout.config.data
    rows, _ = step_rows(candidate.layout.config, candidate.layout.data_parallel_size)
    rate = _rate(typical_row(candidate.layout.config).kind)
    parts = {
        "host launches" if time.host_bound else "kernels": time.compute,
        "collectives": time.communicate,
        "bubble": time.bubble,
        "replicas": time.reduce,
        "optimizer": time.optimizer,
    }
    shares_of_time = ", ".join(
        f"{name} {100 * part / time.total:.0f} %" for name, part in parts.items() if part > 0.005 * time.total
    )
    return (
        f"  {layout_name(candidate):<34} {data.row_budget:>6} {rows:>5} {candidate.memory / GIB:>6.1f} "
        f"{time.total:>8.2f} {candidate.examples_per_second:>{len(rate) + 1}.1f} {100 * mfu:>4.0f}%  "
        f"{f'{candidate.fast:.2f} to {candidate.slow:.2f}':>13} {f'{place}.':>7}  "
        f"{decided_by(candidate, machine):<38}  "
        f"{shares_of_time}"
    )


def decided_by(candidate: Candidate, machine: Machine) -> str:
    """The resource that decides most of a step, and the next: `tensor cores 81 %, network 12 %`."""
    found = shares(lambda card: candidate.time_on(replace(machine, card=card)).total, machine.card)
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in found[:2] if share >= 0.01)


def layout_name(candidate: Candidate) -> str:
    """For example `TP 2 x PP 4 (VPP 2) x DP 8, recomputed`, `TP 1 x DP 8, FSDP, MLP recomputed`."""
    model = candidate.layout.config.model
    virtual = (
        f" (VPP {model.virtual_pipeline_model_parallel_size})" if model.virtual_pipeline_model_parallel_size else ""
    )
    sizes = [("TP", model.tensor_model_parallel_size, ""), ("PP", model.pipeline_model_parallel_size, virtual)]
    sizes += [("CP", model.context_parallel_size, ""), ("DP", candidate.layout.data_parallel_size, "")]
    sizes += [("EP", model.expert_model_parallel_size, "")]
    named = [f"{name} {size}{more}" for name, size, more in sizes if size > 1 or name == "TP"]
    recomputed = {"full": ", recomputed", "selective": ", MLP recomputed"}
    of_layers = recomputed.get(model.activations_checkpoint_granularity or "", "")
    return " x ".join(named) + (", FSDP" if model.fsdp else "") + of_layers

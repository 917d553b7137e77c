"""The text of `dry_run=trace`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from nemo_lmpo.config.rules import ParallelLayout
from nemo_lmpo.runtime.files import GIB
from nemo_lmpo.sizing.cards import CARDS, Card
from nemo_lmpo.sizing.flops import shape_of
from nemo_lmpo.sizing.memory import estimate_memory
from nemo_lmpo.sizing.rank_work import Split, attention_flops, split_of
from nemo_lmpo.sizing.step_time import MicroBatchTime, StepTime, micro_batch_time, step_of
from nemo_lmpo.sizing.typical_rows import assumption, step_rows, typical_row
from nemo_lmpo.trace.run import Trace, trace_rank

TIMED = ("a100", "h100", "h200", "b200")
"""Cards that a step's time is told for."""


def describe_trace(layout: ParallelLayout) -> str:
    """Execute the busiest ranks and tell what they need and do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about running, which this does not
        traces = [trace_rank(layout, rank, transformer_engine=engine) for rank, engine in _subjects(layout)]
    lines = _head(layout) + _memory(layout, traces) + _work(traces) + _times(layout, traces)
    if layout.architecture.experts is not None:
        lines += [
            "",
            "Experts get equally many tokens here. Where they do not, the fullest rank takes longer and needs more.",
        ]
    return "\n".join([*lines, "", "Executed on fake tensors: nothing was trained, read or written."])


def _subjects(layout: ParallelLayout) -> list[tuple[int, bool]]:
    """Ranks of the first and the last stage, with Transformer Engine and without where the recipe leaves it open."""
    stages = layout.config.model.pipeline_model_parallel_size
    first, last = 0, layout.world_size // stages * (stages - 1)
    chosen = layout.config.model.transformer_engine
    subjects = [(rank, chosen is not False) for rank in dict.fromkeys((first, last))]
    return subjects if chosen is not None else [*subjects, (last, False)]


def _head(layout: ParallelLayout) -> list[str]:
    return [f"{layout.config.name}, {layout.architecture.num_parameters():,} parameters, {layout}", ""]


def _name(trace: Trace) -> str:
    return f"rank {trace.rank}, {'TE' if trace.transformer_engine else 'no TE'}"


def _table(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return [f"  {name:<34}" + "".join(f"{value:>16}" for value in values) for name, values in rows]


def _memory(layout: ParallelLayout, traces: Sequence[Trace]) -> list[str]:
    lines = ["memory of tensors, GiB: the most while it lasts (and after it)"]
    rows: list[tuple[str, list[str]]] = [("", [_name(trace) for trace in traces])]
    for number, phase in enumerate(traces[0].phases):
        found = [trace.phases[number] for trace in traces]
        rows.append((phase.name, [f"{each.peak / GIB:.2f} ({each.after / GIB:.2f})" for each in found]))
    rows.append(("peak of a step", [f"{trace.peak / GIB:.2f}" for trace in traces]))
    estimate = estimate_memory(layout).total / GIB
    return [*lines, *_table(rows), f"  dry_run=true computes {estimate:.2f} for the busiest rank", ""]


def _work(traces: Sequence[Trace]) -> list[str]:
    rows: list[tuple[str, list[str]]] = [
        ("", [_name(trace) for trace in traces]),
        ("tokens", [f"{trace.row.tokens:,}" for trace in traces]),
        ("kernels launched", [f"{trace.micro_batch.num_kernels:,}" for trace in traces]),
        ("matrix products, TFLOP", [f"{trace.micro_batch.flops / 1e12:.2f}" for trace in traces]),
        ("other kernels move, GB", [f"{sum(trace.micro_batch.moved.values()) / 1e9:.1f}" for trace in traces]),
    ]
    for key in sorted({key for trace in traces for key in trace.micro_batch.sent}):
        values = [(trace.micro_batch.sent[key], trace.micro_batch.calls[key]) for trace in traces]
        rows.append(
            (f"{key[0]}, {key[1]}: MB sent (calls)", [f"{sent / 1e6:,.0f} ({calls})" for sent, calls in values])
        )
    end: list[tuple[str, list[str]]] = [
        ("kernels launched", [f"{trace.end_of_step.num_kernels:,}" for trace in traces]),
        (
            "values the host reads, whole step",
            [str(trace.forward_backward.host_reads + trace.end_of_step.host_reads) for trace in traces],
        ),
    ]
    for key in sorted({key for trace in traces for key in trace.end_of_step.sent}):
        end.append((f"{key[0]}, {key[1]}: MB sent", [f"{trace.end_of_step.sent[key] / 1e6:,.0f}" for trace in traces]))
    return ["a micro-batch, forward and backward", *_table(rows), "", "the end of a step", *_table(end), ""]


def _times(layout: ParallelLayout, traces: Sequence[Trace]) -> list[str]:
    rows, row = step_rows(layout.config, layout.data_parallel_size)
    lines = [f"time of a step, computed: {rows} micro-batches of {row.tokens:,} tokens, {assumption(layout.config)}"]
    rate = f"{typical_row(layout.config).kind}/s"
    cells: list[tuple[str, list[str]]] = [("", ["step, s", rate, "collectives", "bubble"])]
    for engine in dict.fromkeys(trace.transformer_engine for trace in traces):
        chosen = [trace for trace in traces if trace.transformer_engine == engine]
        for card in map(CARDS.__getitem__, TIMED):
            machine = replace(card, node=min(card.node, max(layout.config.trainer.devices, 1)))
            time = _step(layout, chosen, rows, row.tokens / max(chosen[-1].row.tokens, 1), machine)
            shares = [f"{100 * part / time.total:.0f} %" for part in (time.communicate + time.reduce, time.bubble)]
            speed = layout.config.model.global_batch_size / time.total
            name = f"{card.name}, {'TE' if engine else 'no TE'}" + (", host-bound" if time.host_bound else "")
            cells.append((name, [f"{time.total:.2f}", f"{speed:.1f}", *shares]))
    return [*lines, *_table(cells)]


def _step(layout: ParallelLayout, traces: Sequence[Trace], rows: int, filled: float, card: Card) -> StepTime:
    """A step from executed micro-batches; ``filled``: how full a real one is."""
    shape = shape_of(layout.architecture)
    split = replace(split_of(layout), fused=traces[0].transformer_engine)
    last, first = (_micro_batch(layout, trace, split, filled, card) for trace in (traces[-1], traces[0]))
    return step_of(shape, split, last, first, rows, card)


def _micro_batch(layout: ParallelLayout, trace: Trace, split: Split, filled: float, card: Card) -> MicroBatchTime:
    attention = attention_flops(shape_of(layout.architecture), split, trace.row)
    time = micro_batch_time(trace.micro_batch, attention, split, card)
    # Kernels' number does not depend on how full a micro-batch is, nearly all of the rest does.
    share = 1.0 if time.host_bound else filled
    return MicroBatchTime(time.compute * share, time.communicate * filled, time.host_bound)

"""Published training speeds, which the step-time model is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_lmpo.sizing.cards import CARDS, Machine
from nemo_lmpo.sizing.flops import Shape
from nemo_lmpo.sizing.rank_work import RowSize, Split
from nemo_lmpo.sizing.step_time import step_time


@dataclass(frozen=True)
class Published:
    """A run of somebody else's, in BF16."""

    name: str
    source: str
    card: str
    gpus: int
    shape: Shape
    split: Split
    length: int
    sequences: int
    """Of a micro-batch."""
    micro_batches: int
    """Of a replica and step."""
    tokens_per_second: float = 0.0
    """A GPU's."""
    mfu: float = 0.0
    """Instead: model FLOPs (attention over the full square) as a share of the card's peak."""
    recomputed: float = 0.0
    """Part of the forward products that backward computes again."""
    fitted: bool = False
    """The card's :attr:`nemo_lmpo.sizing.cards.Card.products` was chosen by this run."""


MPT_7B = Shape(32, 4096, 16384, 4096, 8192, 50432, gated=False, tied=True)
LLAMA2_7B = Shape(32, 4096, 11008, 4096, 8192, 32000)
LLAMA3_8B = Shape(32, 4096, 14336, 4096, 2048, 128256)
LLAMA3_405B = Shape(126, 16384, 53248, 16384, 2048, 128256)


def _gpt(layers: int, hidden: int) -> Shape:
    return Shape(layers, hidden, 4 * hidden, hidden, 2 * hidden, 51200, gated=False, tied=True)


def _sharded(ranks: int) -> Split:
    return Split(data=ranks, shard="all", accumulate=4)


def _megatron(pipeline: int, virtual: int) -> Split:
    return Split(tensor=8, pipeline=pipeline, virtual=virtual, sequence_parallel=True, accumulate=8, dense_scores=2048)


_FOUNDRY = "llm-foundry, scripts/train/benchmarking"
_FMS = "fms-fsdp, README; sharded in a node, 16 and 12 replicas"
_TITAN = "torchtitan, docs/performance.md and benchmarks; every other product is recomputed, or all"
_MEGATRON = "Megatron-LM, README of 2023; layouts in arXiv 2205.05198"
_LLAMA3 = "arXiv 2407.21783, table 4; interleaved, 8 virtual stages assumed"
PUBLISHED = (
    Published("MPT-7B", _FOUNDRY, "a100", 8, MPT_7B, _sharded(8), 2048, 6, 1, 4641, fitted=True),
    Published("MPT-7B", _FOUNDRY, "h100", 8, MPT_7B, _sharded(8), 2048, 6, 1, 10643, fitted=True),
    Published("Llama-2-7B", _FMS, "a100", 8, LLAMA2_7B, _sharded(8), 4096, 2, 1, 4550),
    Published("Llama-2-7B", _FMS, "h100", 8, LLAMA2_7B, _sharded(8), 4096, 2, 1, 9600),
    Published("Llama-3-8B", _TITAN, "a100", 64, LLAMA3_8B, _sharded(64), 8192, 1, 1, 2973, recomputed=0.5),
    Published("Llama-3-8B, recomputed", _TITAN, "a100", 64, LLAMA3_8B, _sharded(64), 8192, 1, 1, 2904, recomputed=1.0),
    Published("Llama-3.1-8B", _TITAN, "h100", 8, LLAMA3_8B, _sharded(8), 8192, 1, 1, 6667, recomputed=0.5),
    Published("GPT 22B", _MEGATRON, "a100", 8, _gpt(48, 6144), _megatron(1, 1), 2048, 4, 1, mfu=0.415),
    Published("GPT 175B", _MEGATRON, "a100", 64, _gpt(96, 12288), _megatron(8, 3), 2048, 1, 64, mfu=0.514),
    Published("GPT 530B", _MEGATRON, "a100", 280, _gpt(105, 20480), _megatron(35, 3), 2048, 1, 280, mfu=0.560),
    Published("GPT 1T", _MEGATRON, "a100", 512, _gpt(128, 25600), _megatron(64, 1), 2048, 1, 512, mfu=0.563),
    Published(
        "Llama-3.1-405B",
        _LLAMA3,
        "h100",
        8192,
        LLAMA3_405B,
        Split(8, 16, 8, 1, 64, True, shard="optimizer", overlap=True, accumulate=8),
        8192,
        1,
        32,
        mfu=0.43,
    ),
)


def step_tokens(run: Published) -> int:
    """Tokens of a step of all replicas."""
    return run.length * run.sequences * run.micro_batches * run.split.data


def published_speed(run: Published) -> float:
    """Tokens/s of a GPU as published."""
    if run.tokens_per_second:
        return run.tokens_per_second
    return run.mfu * CARDS[run.card].peak / run.shape.model_flops(1, 1, run.length)


def computed_speed(run: Published, end: Callable[[Machine], Machine] = lambda machine: machine) -> float:
    """Tokens/s of a GPU by the model; ``end`` makes another machine of the one that is assumed."""
    card = CARDS[run.card]
    machine = end(Machine(replace(card, node=min(card.node, run.gpus)), max(1, run.gpus // card.node)))
    tokens = run.length * run.sequences
    row = RowSize(tokens, tokens, run.sequences * run.length * (run.length + 1) // 2)
    if run.split.dense_scores:
        row = replace(row, attended=run.sequences * run.length**2)
    once, twice = (
        step_time(run.shape, replace(run.split, recompute=recompute), row, run.micro_batches, machine).total
        for recompute in (False, True)
    )
    seconds = (1 - run.recomputed) * once + run.recomputed * twice
    return step_tokens(run) / seconds / run.gpus


def error(run: Published) -> float:
    """Computed over published speed, less one."""
    return computed_speed(run) / published_speed(run) - 1


def table() -> str:
    """All of them in Markdown."""
    lines = ["| run | GPUs | layout | published | computed | error | source |", "|---|---|---|---|---|---|---|"]
    for run in PUBLISHED:
        split = run.split
        sharded = "FSDP" if split.shard == "all" else f"TP {split.tensor} x PP {split.pipeline} x DP {split.data}"
        mark = " (fitted)" if run.fitted else ""
        speeds = f"{published_speed(run):,.0f} | {computed_speed(run):,.0f} | {100 * error(run):+.0f} %{mark}"
        lines.append(
            f"| {run.name}, {run.length} tokens | {run.gpus} x {run.card.upper()} | {sharded} "
            f"| {speeds} | {run.source} |"
        )
    return "\n".join(lines)

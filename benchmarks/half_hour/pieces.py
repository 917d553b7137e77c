"""The pieces of the half-hour: each a command of a few minutes, with small shapes for a rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HALF_HOUR = 1800.0
DISK_GIB = 64.0
"""Of the smallest machine that is thought of."""
BYTES_PER_PARAMETER = 14
"""Of a checkpoint in BF16: weights, and in float32 main parameters and both moments."""
KEPT_AT_ONCE = 2
"""Checkpoints on disk while one is written: the one before goes when it is whole."""


@dataclass(frozen=True)
class Piece:
    """A command and what its section is called."""

    name: str
    part: str
    """What can be asked for by itself; also where its result stands on the page."""
    title: str
    command: Sequence[str]
    """What follows `python`."""
    seconds: float
    """How long it may take on an H100: estimated generously, to be corrected by the first measurement."""
    environment: tuple[tuple[str, str], ...] = ()
    directory: str | None = None
    """What it writes below the work directory; cleared before a new attempt, unless another piece went before."""
    continues: bool = False
    """Whether it goes on from the piece before, in the same directory."""
    engine: bool = False
    """Whether it needs Transformer Engine."""


LARGE = {"hidden_size": 4096, "intermediate_size": 3584, "num_attention_heads": 32, "num_key_value_heads": 8}
LARGE_LAYERS = 20
SMALL = ("model.architecture.num_hidden_layers=2", "model.global_batch_size=8", "data.train.limit=64")
QUIET = ("data.validation.limit=8", "logging.tensorboard=false", "logging.report=false", "logging.progress_bar=false")


def large_overrides() -> list[str]:
    """A model whose checkpoints are as large as the disk allows: 1.72 B parameters."""
    sizes = [f"model.architecture.{name}={value}" for name, value in LARGE.items()]
    return [*sizes, f"model.architecture.num_hidden_layers={LARGE_LAYERS}"]


def pieces(work: Path, *, rehearse: bool) -> list[Piece]:
    """All of them, in order."""
    return [
        Piece("doctor", "doctor", "Doctor", ["-m", "nemo_lmpo.doctor", f"--directory={work}"], 60),
        *_runs(work, rehearse),
        _tests(work, "tests", "Tests", "not transformer_engine", rehearse, 240),
        *_attention(rehearse),
        *_rank(rehearse),
        *_checkpoints(work, rehearse),
        _tests(work, "tests_engine", "Tests with Transformer Engine", "transformer_engine", rehearse, 180),
        _one_rank("rank_engine", "Transformer Engine", ["model.transformer_engine=true"], rehearse, engine=True),
    ]


def _train(*overrides: str) -> list[str]:
    return ["-m", "nemo_lmpo.train", "--config-name", "lmpo_tiny", *QUIET, *overrides]


def _runs(work: Path, rehearse: bool) -> list[Piece]:
    tiny = [f"run_dir={work / 'tiny'}", "trainer.precision=bf16", "checkpoint.async_save=true"]
    every, steps = (2, (4, 6, 8)) if rehearse else (10, (30, 40, 42))
    tiny += [f"checkpoint.save_interval={every}", "optim.sched.name=constant", *(SMALL if rehearse else ())]
    first, second, third = (_train(*tiny, f"trainer.max_steps={count}") for count in steps)
    hidden = (("CUDA_VISIBLE_DEVICES", ""),)
    return [
        Piece("run", "runs", "Training, asynchronous checkpoints", first, 90, directory="tiny"),
        Piece("run_resumed", "runs", "Resumed", second, 60, directory="tiny", continues=True),
        Piece("run_on_cpu", "runs", "Resumed on the CPU", third, 90, hidden, directory="tiny", continues=True),
    ]


def _tests(work: Path, name: str, title: str, mark: str, rehearse: bool, seconds: float) -> Piece:
    command = ["-m", "pytest", "tests/gpu", "-m", mark, f"--junitxml={work / name}.xml", "-p", "no:cacheprovider"]
    command += ["-q", "-x", "--rehearse"] if rehearse else ["-q"]
    return Piece(name, "engine" if name.endswith("engine") else "tests", title, command, seconds)


def _attention(rehearse: bool) -> list[Piece]:
    few = ["--pairs", "1", "--rounds", "1"] if rehearse else []
    groups = {heads: (heads // 8, heads // 16 or 1) if rehearse else (heads, heads // 4) for heads in (8, 32)}
    return [
        Piece(
            f"attention_{heads}",
            "attention",
            f"Attention, {heads} heads",
            ["benchmarks/attention_kernels.py", "--heads", *map(str, groups[heads]), *few],
            60,
        )
        for heads in (8, 32)
    ]


def _rank(rehearse: bool) -> list[Piece]:
    local = "model.transformer_engine=false"
    longer = ["--row-tokens", "512" if rehearse else "8192"]
    return [
        _one_rank("rank", "row 4096", [local], rehearse),
        _one_rank("rank_8192", "row 8192", [*longer, local], rehearse),
        _one_rank("rank_chunk", "logits of 4096 positions", [local, "model.logprob_chunk_tokens=4096"], rehearse),
    ]


def _one_rank(name: str, title: str, arguments: list[str], rehearse: bool, *, engine: bool = False) -> Piece:
    small = ["--hidden", "256", "--layers", "2", "--row-tokens", "256", "--pairs", "4", "--steps", "1"]
    command = ["benchmarks/one_rank.py", *(small if rehearse else []), *arguments]
    part = "engine" if engine else "rank"
    return Piece(name, part, f"A rank of TP 4, {title}", command, 120, engine=engine)


def _checkpoints(work: Path, rehearse: bool) -> list[Piece]:
    large = [*(SMALL if rehearse else large_overrides()), "trainer.precision=bf16", "trainer.val_check_interval=0"]
    large += ["checkpoint.keep_last=1", "checkpoint.keep_best=0", "optim.sched.name=constant"]
    large += [f"run_dir={work / 'large'}"]
    background = ["checkpoint.async_save=true", "checkpoint.save_interval=3"]
    size = "small" if rehearse else "1.7 B parameters"
    saved, resumed = (_train(*large, f"trainer.max_steps={steps}") for steps in (3, 5))
    written = _train(*large, *background, "trainer.max_steps=6", "checkpoint.resume=true")
    return [
        Piece("saved", "checkpoints", f"Saved, {size}", saved, 120, directory="large"),
        Piece("resumed", "checkpoints", f"Resumed, {size}", resumed, 120, directory="large", continues=True),
        Piece("in_background", "checkpoints", f"Saved in the background, {size}", written, 120, directory="large"),
    ]

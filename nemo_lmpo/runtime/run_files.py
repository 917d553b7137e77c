"""Names of the files of a run directory and of a checkpoint: the one place that has them.

It stands below everything, as the report, the metrics log, Slurm's status and the checkpoints all use it and must not
import each other.

A run directory (``runs/<recipe>`` unless set)::

    config.yaml        the resolved configuration
    chat.json          the text of the chat template that the run began with, and what else decides its token ids
    metrics.jsonl      a line per step
    samples.jsonl      a line an answer that was sampled (`logging.samples`)
    run.json           what the report cannot see in the metrics
    changes.jsonl      settings that a resume changed on purpose
    checkpoints/       step_0000100/, and what was set aside: step_0000100.damaged/
    hang/              what a run that hung left: stacks_RANK.txt, and collectives_RANK for `torchfrtrace`
    .lock, .owner.json who works in it
    job.json           the batch job that does
    tensorboard/, report.html, report/, wandb_id
    huggingface/       the finished run as `transformers` and vLLM load it (`checkpoint.export_hf`)

A checkpoint (``step_0000100/``; while it is written ``step_0000100.tmp/``)::

    state/             weights, optimizer, random states: a megatron-core distributed checkpoint
    progress.json      step, margin statistics, metrics, layout, fingerprints of the data
    config.yaml        the run's resolved configuration
    architecture.json  the model's Hugging Face config
    tokenizer/         the tokenizer's files, as the start model has them
    chat.json          chat template, system prompt and end of turn of the training
    adapter.json       where the checkpoint holds adapters only: which, and of which base
    manifest.json      size and checksum of every file above; written last
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.yaml"
CHAT = "chat.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RUN_FACTS = "run.json"
CHANGES = "changes.jsonl"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
OWNER = ".owner.json"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"
HUGGINGFACE = "huggingface"
HANG = "hang"
STACKS = "stacks_"
"""Beginning of the files' names in there; the rank follows."""

STATE = "state"
COMMON = "common.pt"
PROGRESS = "progress.json"
ARCHITECTURE = "architecture.json"
TOKENIZER = "tokenizer"
MANIFEST = "manifest.json"
ADAPTER = "adapter.json"

TEMPORARY, DELETED, DAMAGED, REPLACED = ".tmp", ".deleted", ".damaged", ".replaced"
"""Suffixes of checkpoints that are being written, not wanted, not readable, in the way of a new one."""
BEFORE = ".before"
"""Suffix of a run directory that was moved aside."""

_STEP = re.compile(r"step_(\d{7,})")


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:07d}"


def step_of(name: str) -> int | None:
    """The step that a checkpoint's name tells; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def saved_steps(root: Path) -> list[int]:
    """Steps of visible checkpoints, oldest first.

    Raises:
        OSError: ``root`` cannot be read.
    """
    if not root.is_dir():
        return []
    return sorted(step for entry in root.iterdir() if (step := step_of(entry.name)) is not None)

"""Sampled answers in one process: training does not notice them, and a resumed run leaves the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_lmpo import training
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.data.example import Example
from nemo_lmpo.monitor.samples import Sample
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.samples import distinct_prompts, sample_metrics
from tests.distributed.training_runs import metrics_of
from tests.system.processes import SMALL

SETTINGS = (
    "optim.lr=1e-3",
    "optim.sched.name=constant",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "checkpoint.save_interval=2",
    "checkpoint.keep_last=3",
    "model.architecture.tie_word_embeddings=false",
)
SAMPLED = ("logging.samples=3", "logging.sample_tokens=6")
# Adapters' dropout draws a random number for every token of training.
DROPOUT = ("model.peft.name=lora", "model.peft.rank=4", "model.peft.dropout=0.2")


def trained(folder: Path, *more: str) -> Path:
    config = load_recipe("lmpo_tiny", [*SMALL, *SETTINGS, f"run_dir={folder}", *more])
    training.run(config, LaunchInfo())
    return folder


def answers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def without_samples(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if "samples" not in name} for line in metrics_of(run)]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("sampled") / "run", *SAMPLED, *DROPOUT)


def test_training_is_the_same_to_the_bit(sampled: Path, tmp_path: Path) -> None:
    plain = trained(tmp_path / "run", *DROPOUT)
    assert not (plain / "samples.jsonl").exists()
    assert without_samples(sampled) == metrics_of(plain)
    states = [sorted((run / "checkpoints" / "step_0000004" / "state").glob("*.distcp")) for run in (sampled, plain)]
    assert states[0]
    for ours, theirs in zip(*states, strict=True):  # weights, moments and random states
        assert ours.read_bytes() == theirs.read_bytes()


def test_what_is_written(sampled: Path) -> None:
    lines = answers(sampled)
    assert [(line["step"], line["prompt_index"]) for line in lines] == [
        (step, i) for step in (0, 2, 4) for i in range(3)
    ]
    prompts = [line["prompt"] for line in lines]
    assert prompts == prompts[:3] * 3
    assert len(set(prompts)) == 3
    assert all(1 <= line["tokens"] <= 6 and (line["finished"] or line["tokens"] == 6) for line in lines)
    assert {line["finished"] for line in lines} <= {True, False}
    validations = [line for line in metrics_of(sampled) if "val/loss" in line]
    for step, line in zip((2, 4), validations, strict=True):
        lengths = [answer["tokens"] for answer in lines if answer["step"] == step]
        assert line["val/samples/length"] == sum(lengths) / 3


def test_a_resumed_run_leaves_the_same_file(sampled: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *SAMPLED, *DROPOUT, "trainer.max_steps=2")
    with (run / "samples.jsonl").open("a") as file:  # what a run leaves that is killed after another validation
        file.write(
            '{"step": 4, "prompt_index": 0, "prompt": "of later", "answer": "", "tokens": 1, "finished": true}\n'
        )
        file.write('{"step": 4, "prompt_ind')
    trained(run, *SAMPLED, *DROPOUT)
    assert answers(run) == answers(sampled)


def test_a_prompt_has_only_the_positions_of_the_model(tmp_path: Path) -> None:
    """Prompts of 5 to 12 tokens in a model of 64 positions: an answer fills what they leave."""
    settings = (
        "logging.samples=4",
        "model.architecture.max_position_embeddings=64",
        "optim.lr=0",
        "trainer.max_steps=1",
    )
    lines = answers(trained(tmp_path / "run", *settings, "model.architecture.tie_word_embeddings=true"))
    tokens = [(len(line["prompt"].split()), line["tokens"]) for line in lines if not line["finished"]]
    assert tokens
    assert all(prompt + answer == 64 for prompt, answer in tokens)
    assert len(set(tokens)) > 1


def test_metrics_by_hand() -> None:
    samples = [Sample("p", "a", 3, True), Sample("q", "b", 8, False), Sample("r", "c", 4, True)]
    assert sample_metrics(samples) == {"samples/length": 5.0, "samples/truncated": 1 / 3}


class _Pairs:
    """Prompts by their ids; how many were read."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts, self.read = prompts, 0
        self.lengths = np.ones((len(prompts), 3))

    num_responses = 2
    mismatched = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Example:
        self.read += 1
        return Example.pair("p", self.prompts[index], [1], [2])


def test_first_distinct_prompts() -> None:
    pairs = _Pairs([[1, 2], [1, 2], [3], [1, 2], [4], [5]])
    assert distinct_prompts(pairs, 3) == [[1, 2], [3], [4]]
    assert pairs.read == 5
    assert distinct_prompts(pairs, 9) == [[1, 2], [3], [4], [5]]

"""Sampled answers are those of `transformers` in every layout, and leave training alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_lmpo.answers.engine import load_generator
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.example_table import ExampleTable
from tests.distributed.training_runs import metrics_of, train, weights_of
from tests.distributed.workers import run_workers

SAMPLES, MOST_TOKENS = 5, 12
# Random weights: with an output matrix of its own, a model does not just repeat its last token. Of these, the answers
# are five different ones, of which two reach the limit.
SETTINGS = (
    "model.architecture.tie_word_embeddings=false",
    "model.seed=19",
    "trainer.max_steps=1",
    f"logging.samples={SAMPLES}",
    f"logging.sample_tokens={MOST_TOKENS}",
)
TP2, PP2, CP2 = (f"model.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context"))
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "tp2": (2, (TP2,)),
    "tp2_sequence": (2, (TP2, "model.sequence_parallel=true")),
    "pp2": (2, (PP2,)),
    "pp2_vpp2": (2, (PP2, "model.virtual_pipeline_model_parallel_size=2")),
    "cp2": (2, (CP2,)),
    "dp2": (2, ("optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true")),
    "dp4_with_less_prompts_than_ranks": (4, ("logging.samples=3",)),
    "dp4_fsdp_with_less_prompts_than_ranks": (4, ("model.fsdp=true", "logging.samples=3")),
    "tp2_pp2": (4, (TP2, PP2)),
    "cp2_tp2_sequence": (4, (CP2, TP2, "model.sequence_parallel=true")),
    "narrow_rows_and_prompts_twice": (
        1,
        ("data.row_tokens=128", "model.micro_batch_size=1", "data.share_prompt=false"),
    ),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint holds the start weights."""
    run = tmp_path_factory.mktemp("start") / "run"
    run_workers(1, train, str(run), (*SETTINGS, "optim.lr=0"))
    return run


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def by_transformers(model: Path, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same lines with the answers that `transformers` generates."""
    generator = load_generator(model, device="cpu", dtype=torch.float32)
    prompts = [generator.tokenizer(line["prompt"], add_special_tokens=False)["input_ids"] for line in asked]
    answers = generator.respond(prompts, Sampling(max_new_tokens=MOST_TOKENS, batch_size=1))
    return [
        {**line, "answer": answer.text, "tokens": len(answer.token_ids), "finished": answer.finished}
        for line, answer in zip(asked, answers, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_transformers(layout: str, start: Path, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    run_workers(world_size, train, str(tmp_path / "run"), (*SETTINGS, *overrides))
    lines = lines_of(tmp_path / "run")
    count = 3 if "logging.samples=3" in overrides else SAMPLES
    assert [(line["step"], line["prompt_index"]) for line in lines] == [(s, i) for s in (0, 1) for i in range(count)]
    before, after = lines[:count], lines[count:]
    assert before == by_transformers(start, before)
    assert after == by_transformers(tmp_path / "run", after)
    assert len({line["answer"] for line in before}) == count
    assert {line["finished"] for line in before} == {True, False}
    (validation,) = [line for line in metrics_of(tmp_path / "run") if "val/loss" in line]
    assert validation["val/samples/length"] == sum(line["tokens"] for line in after) / count
    assert validation["val/samples/truncated"] == sum(not line["finished"] for line in after) / count


@contextmanager
def broken(fault: str) -> Iterator[None]:
    from nemo_lmpo.model.packed_gpt import PackedGPTModel
    from nemo_lmpo.parallel.logprobs import VocabularyPart
    from nemo_lmpo.training import samples

    with pytest.MonkeyPatch.context() as patch:
        if fault == "vocabulary":  # every rank takes its part for the first one
            part = PackedGPTModel.vocabulary_part
            patch.setattr(PackedGPTModel, "vocabulary_part", lambda self: VocabularyPart(0, part(self).vocab_size))
        elif fault == "context":  # the first rank is taken for the one that holds every sequence's end
            first = SimpleNamespace(all_reduce=lambda tokens, group: dist.broadcast(tokens, group_src=0, group=group))
            patch.setattr(samples, "dist", first)
        elif fault == "data":  # the other replica's answers are not collected
            patch.setattr(ExampleTable, "share", lambda *_: None)
        yield


def train_broken(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...], fault: str) -> None:
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session
    from tests.distributed.training_runs import COMMON

    settings = [*COMMON, f"run_dir={run_dir}", "trainer.num_threads=1", *overrides]
    with broken(fault), open_session(load_recipe("lmpo_tiny", settings), launch) as session:
        samples = session.trainer().samples
        assert samples is not None
        taken = samples.take()
        if launch.is_main:
            lines = [{**vars(sample), "step": 0, "prompt_index": index} for index, sample in enumerate(taken)]
            Path(run_dir, "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("fault", "layout"), [("none", "tp2"), ("vocabulary", "tp2"), ("context", "cp2"), ("data", "dp2")]
)
def test_the_comparison_finds_faults(fault: str, layout: str, start: Path, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    run_workers(world_size, train_broken, str(tmp_path / "run"), (*SETTINGS, *overrides), fault)
    lines = lines_of(tmp_path / "run")
    assert (lines == by_transformers(start, lines)) == (fault == "none")


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Where gradients are reduced while backward runs, and layers computed again in it."""
    layout = (
        TP2,
        "model.sequence_parallel=true",
        "optim.use_distributed_optimizer=true",
        "optim.overlap_grad_reduce=true",
        "model.activations_checkpoint_granularity=full",
        "trainer.max_steps=2",
        "trainer.val_check_interval=1",
        "logging.sample_tokens=3",
    )
    for name, samples in (("sampled", SAMPLES), ("plain", 0)):
        run_workers(4, train, str(tmp_path / name), (*SETTINGS, *layout, f"logging.samples={samples}"))
    sampled = [
        {name: line[name] for name in line if "samples" not in name} for line in metrics_of(tmp_path / "sampled")
    ]
    assert sampled == metrics_of(tmp_path / "plain")
    assert len(lines_of(tmp_path / "sampled")) == 3 * SAMPLES
    found, expected = weights_of(tmp_path / "sampled", 2), weights_of(tmp_path / "plain", 2)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())

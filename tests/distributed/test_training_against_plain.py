"""The whole trainer against a loop of plain transformers and torch, from the same weights on the same pairs.

Tolerances: float32 rounds at 2^-24 = 6e-8. A log-probability goes through four layers and a sum over up to 21
tokens, so losses agree within 1e-6 relative, and gradients, which are sums over 24 sequences, within 1e-5. AdamW
divides by the gradient's size, which turns a relative error of a gradient into the same relative error of the
move (eps=1e-5 damps gradients that are noise), and each step rounds the weight itself once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.data.builtin.tiny_task import builtin_rows
from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer
from nemo_lmpo.data.order import PairSampler
from nemo_lmpo.formats.architecture import architecture_to_hf
from nemo_lmpo.formats.source import RandomSource
from nemo_lmpo.training.start_model import find_start_model
from tests.distributed.plain_trainer import Pair, PlainTrainer, Settings, tokenize
from tests.distributed.training_runs import COMMON, metrics_of, train, weights_of
from tests.distributed.workers import run_workers

ROUNDING = 2.0**-24
STEPS, PAIRS, VALIDATION_PAIRS = 4, 12, 10
SETUP = (
    f"trainer.max_steps={STEPS}",
    "optim.sched.warmup_fraction=0.25",
    "optim.weight_decay=0.1",
    "loss.std_floor=1e-6",  # margins of random weights differ by less than the default floor
)
CASES: dict[str, tuple[tuple[str, ...], Settings]] = {
    "paper_ema": ((), Settings()),
    # Validation in between leaves the statistics alone.
    "paper_cumulative": (("loss.statistics=cumulative", "trainer.val_check_interval=2"), Settings(cumulative=True)),
    "paper_large_lambda": (("loss.lam=1.0", "loss.momentum=0.5"), Settings(lam=1.0, momentum=0.5)),
    # The authors' micro-batches are groups of pairs in the sampler's order, however pairs are packed.
    "released_one_row": (("loss.compat=released_code", "data.row_tokens=2000"), Settings(released=True)),
    "released_many_rows": (("loss.compat=released_code", "trainer.val_check_interval=2"), Settings(released=True)),
    "released_groups_of_five": (
        ("loss.compat=released_code", "loss.group_size=5", "trainer.val_check_interval=2"),
        Settings(released=True),
    ),
    "clipped": (("trainer.gradient_clip_val=0.05",), Settings(clip=0.05)),
    "untied": (("model.architecture.tie_word_embeddings=false",), Settings()),
}


def micro_batches(pairs: list[Pair], size: int) -> list[list[Pair]]:
    """A batch in groups, in its order."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


@pytest.mark.parametrize("case", CASES)
def test_trains_like_plain_transformers(case: str, tmp_path: Path) -> None:
    overrides, settings = CASES[case]
    overrides = (*SETUP, *overrides)
    settings.weight_decay, settings.warmup_steps, settings.total_steps = 0.1, 1, STEPS
    (statistics,) = run_workers(1, train, str(tmp_path / "run"), overrides)
    found = [line for line in metrics_of(tmp_path / "run") if "loss" in line]
    validations = [line["val/loss"] for line in metrics_of(tmp_path / "run") if "val/loss" in line]

    config = load_recipe("lmpo_tiny", [*COMMON, *overrides])
    architecture = find_start_model(config.model).architecture
    source = RandomSource(architecture, config.model.seed)
    start = {name: source.get(name) for name in source.names()}
    plain = PlainTrainer(LlamaConfig(**architecture_to_hf(architecture)), start, settings)
    tokenizer = tiny_tokenizer()
    rows = builtin_rows("tiny", "train")
    sampler = PairSampler(len(rows), PAIRS, config.model.seed)
    held_out = tokenize(builtin_rows("tiny", "test")[:VALIDATION_PAIRS], tokenizer)
    expected, expected_validations = [], []
    group = config.loss.group_size or 8
    held_out_group = config.loss.group_size or 16
    for step in range(STEPS):
        batch = tokenize([rows[index] for index in sampler.pairs_of_step(step)], tokenizer)
        expected.append(plain.step(micro_batches(batch, group)))
        interval = config.trainer.val_check_interval
        if step + 1 == STEPS or (interval and (step + 1) % interval == 0):
            expected_validations.append(plain.validate(micro_batches(held_out, held_out_group)))

    # One rounding of a margin, divided by the standard deviation, moves the normalised margin of Eq. 9.
    slack = settings.lam * ROUNDING / min(line["lmpo/std"] for line in expected)
    # The released code's deviations, from zero, are so small that losses are all but (m - a) / b.
    near = 1e-5 if settings.released else 1e-6
    for name, relative, absolute in (
        ("loss", near, slack),
        ("grad_norm", 1e-5, 0.0),
        ("lr", 1e-9, 0.0),
        ("lmpo/mean", 1e-6, 0.0),
        ("lmpo/std", 1e-5, 0.0),
    ):
        both = [(ours[name], theirs[name]) for ours, theirs in zip(found, expected, strict=True) if name in ours]
        # Statistics that are updated after a step are not there in the first.
        assert len(both) == (STEPS - 1 if name.startswith("lmpo/") and not settings.released else STEPS), name
        assert [ours for ours, _ in both] == pytest.approx([theirs for _, theirs in both], rel=relative, abs=absolute)
    assert validations == pytest.approx(expected_validations, rel=near, abs=slack)
    assert corrected(statistics, settings) == pytest.approx(plain.statistics.current(), rel=1e-5)
    compare_weights(weights_of(tmp_path / "run", STEPS), plain, start)


def corrected(state: dict[str, Any], settings: Settings) -> tuple[float, float]:
    """Mean and standard deviation from the state in a checkpoint."""
    if settings.cumulative:
        return state["mean"], (state["spread"] / (state["spread_count"] - 1)) ** 0.5
    weight = 1.0 if settings.released else 1 - settings.momentum ** state["mean_count"]
    return state["mean"] / weight, state["spread"] / weight


def compare_weights(found: dict[str, torch.Tensor], plain: PlainTrainer, start: dict[str, torch.Tensor]) -> None:
    expected = plain.model.state_dict()
    for name, tensor in found.items():
        moved = (expected[name] - start[name].double()).norm()
        off = (tensor.double() - expected[name]).norm()
        assert moved > 0, f"{name} did not move: nothing is compared"
        assert off < 1e-5 * moved + STEPS * ROUNDING * expected[name].norm(), f"{name}: {off / moved:.1e} of its way"

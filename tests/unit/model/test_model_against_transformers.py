"""The whole packed model against transformers: log-probabilities, and the gradient of the loss in every weight."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.data.example import Example
from nemo_lmpo.data.pack import pack_examples
from nemo_lmpo.formats.architecture import read_architecture
from nemo_lmpo.formats.families import FAMILIES as FAMILY_TABLE
from nemo_lmpo.formats.fused_experts import separate_experts
from nemo_lmpo.formats.huggingface import HuggingFaceSource
from nemo_lmpo.formats.mapping import separate
from nemo_lmpo.loss.options import LMPOConfig
from nemo_lmpo.loss.registry import build_loss
from nemo_lmpo.loss.running_statistics import RunningStatistics
from nemo_lmpo.model.build import build_model_chunks
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.model.load_weights import _targets, load_model_weights
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import MicroBatch, localize
from nemo_lmpo.training.step import MicroBatchStep
from tests.distributed.plain_trainer import MarginStatistics, Pair, Settings, margin, pair_loss
from tests.unit.formats.tiny_models import FAMILIES, save

CPU = torch.device("cpu")


def make_pairs(vocab_size: int) -> list[Example]:
    """Sequences of up to 45 tokens: longer than Mistral's window of 16 and than half of Llama 3.1's original 64."""
    rng = random.Random(6)

    def ids(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    shapes = ((12, 9, 20), (25, 20, 3), (1, 1, 30))
    return [Example.pair(f"p{i}", ids(a), ids(b), ids(c)) for i, (a, b, c) in enumerate(shapes)]


def build(directory: Path, groups: ParallelGroups) -> PackedGPTModel:
    architecture, config = read_architecture(directory), ModelConfig()
    (model,) = build_model_chunks(
        architecture,
        config,
        groups=groups,
        dtype=torch.float32,
        device=CPU,
        kernels=Kernels(transformer_engine=False, attention="sdpa"),
    )
    load_model_weights([model], HuggingFaceSource(directory), architecture, tp_rank=0, tp_size=1)
    return model


def rows_of(pairs: list[Example], *, share_prompt: bool) -> list[MicroBatch]:
    """Two packed rows, one of them padded."""
    rows = [
        pack_examples(pairs[:2], [0, 1], share_prompt=share_prompt, pad_to_multiple=8, pad_id=3),
        pack_examples(pairs[2:], [2], share_prompt=share_prompt),
    ]
    return [localize(row, cp_rank=0, cp_size=1) for row in rows]


def token_logps(model: PackedGPTModel, rows: list[MicroBatch]) -> list[Tensor]:
    """Per-token log-probabilities of every sequence, chosen and rejected in turn."""
    result = []
    for row in rows:
        hidden = model(row.input_ids, row.position_ids, row.attention_plan)
        logps = model.scores(hidden, row.predict_positions, row.target_ids, chunk_tokens=11, correct=False)[0]
        result += [logps[row.sequence_index == number] for number in range(2 * row.num_examples)]
    return result


def exact_token_logps(model: torch.nn.Module, pairs: list[Example]) -> list[Tensor]:
    result = []
    for pair in pairs:
        for response in (response.ids for response in pair.responses):
            ids = torch.tensor([pair.prompt_ids + response])
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
            first = len(pair.prompt_ids) - 1
            result.append(logps[range(first, first + len(response)), response])
    return result


def exact_gradients(model: torch.nn.Module, pairs: list[Example], seen: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, with the margins ``seen`` before."""
    settings = Settings()
    statistics = MarginStatistics(settings)
    statistics.update(seen)
    sums = [logps.sum() for logps in exact_token_logps(model, pairs)]
    losses = [
        pair_loss(
            s_w, s_l, Pair(p.prompt_ids, *(response.ids for response in p.responses)), settings, statistics.current()
        )
        for s_w, s_l, p in zip(sums[::2], sums[1::2], pairs, strict=True)
    ]
    torch.stack(losses).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    experts = getattr(FAMILY_TABLE[cast(Any, model).config.model_type], "experts", None)
    if experts is None:
        return found
    return {
        name: gradient[selection]
        for stored, gradient in found.items()
        for name, selection, _ in separate_experts(stored, tuple(gradient.shape), experts)
    }


def our_gradients(
    model: PackedGPTModel, rows: list[MicroBatch], groups: ParallelGroups, seen: Tensor
) -> dict[str, Any]:
    loss = build_loss(LMPOConfig(beta=2.0, log_h=1.0, lam=0.2))
    assert loss.statistics is not None
    statistics = RunningStatistics(loss.statistics)
    statistics.update(seen)
    step = MicroBatchStep(loss, groups, chunk_tokens=11, device=CPU)
    step.begin(sum(row.num_examples for row in rows), statistics=statistics.current())
    for row in rows:
        hidden, finish = step.forward_step(iter([row]), model)
        finish(hidden)[0].backward()
    gradients: dict[str, torch.Tensor] = {}
    for _, parameter, rule, layer in _targets(model, model.architecture):
        assert rule is not None
        parts = separate(rule, parameter.grad, model.architecture)
        gradients.update(zip(rule.hf_names(layer), parts, strict=True))
    return gradients


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("share_prompt", [True, False])
def test_log_probabilities_and_gradients(directory: Path, share_prompt: bool, one_process: ParallelGroups) -> None:
    model = build(directory, one_process)
    # Their grouped products take no float64.
    options = {} if model.architecture.experts is None else {"experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", **options
    )
    pairs = make_pairs(model.architecture.vocab_size)
    rows = rows_of(pairs, share_prompt=share_prompt)
    with torch.no_grad():
        found, expected = token_logps(model, rows), exact_token_logps(theirs, pairs)
    assert len(found) == len(expected) == 2 * len(pairs)
    for ours, exact in zip(found, expected, strict=True):
        # These random models are as sure as trained ones: log-probabilities of -13, whose float32 ulp is 1e-6.
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-5)
    seen = torch.tensor([0.2, 0.9, 0.6])
    mine, gradients = our_gradients(model, rows, one_process, seen), exact_gradients(theirs, pairs, seen)
    assert mine.keys() == gradients.keys()
    for name, exact in gradients.items():
        error = (mine[name].double() - exact).norm() / exact.norm()
        assert error < 2e-5, f"{name}: {error:.1e}"


def test_margins_matter_in_the_gradient() -> None:
    """Guards the test above: with lambda 0.2 and these statistics the margin is not a rounding error."""
    s_w, s_l = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True), torch.tensor(-5.0, dtype=torch.float64)
    value = margin(s_w, s_l, 4, 6, Settings())
    (gradient,) = torch.autograd.grad(value, s_w)
    assert abs(float(gradient)) > 0.01

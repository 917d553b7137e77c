"""Routers against transformers': what they count, and the gradient of the term that balances experts."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.data.example import PAIRS, Example
from nemo_lmpo.data.pack import pack_examples
from nemo_lmpo.formats.architecture import read_architecture
from nemo_lmpo.formats.families import FAMILIES
from nemo_lmpo.formats.fused_experts import separate_experts
from nemo_lmpo.formats.mapping import separate
from nemo_lmpo.model.load_weights import _targets
from nemo_lmpo.model.mixture import BalancedRouter, use_balanced_routers
from nemo_lmpo.model.packed_gpt import PackedGPTModel
from nemo_lmpo.parallel.groups import ParallelGroups
from nemo_lmpo.training.batches import MicroBatch, StepBatch, localize, sequence_membership
from nemo_lmpo.training.expert_load import ExpertLoad
from tests.unit.formats.tiny_models import save
from tests.unit.model.test_model_against_transformers import build, make_pairs

COEFFICIENT = 0.3


def rows_with_membership(pairs: list[Example], *, share_prompt: bool) -> list[MicroBatch]:
    """Two packed rows, one of them padded."""
    rows = [
        pack_examples(pairs[:2], [0, 1], share_prompt=share_prompt, pad_to_multiple=8, pad_id=3),
        pack_examples(pairs[2:], [2], share_prompt=share_prompt),
    ]
    return [localize(row, cp_rank=0, cp_size=1, membership=True) for row in rows]


def step_of(rows: list[MicroBatch]) -> StepBatch:
    return StepBatch(rows, ["a", "b", "c"], PAIRS, 0, 0, 0, 0.0, 1.0)


def run_rows(model: PackedGPTModel, rows: list[MicroBatch]) -> list[Tensor]:
    return [model(row.input_ids, row.position_ids, row.attention_plan, membership=row.membership) for row in rows]


def exact_logits(model: torch.nn.Module, pairs: list[Example]) -> list[list[Tensor]]:
    """Router logits of every sequence as it is fed, its last token left out: ``[layers][tokens, E]`` float64."""
    found: list[list[Tensor]] = []
    for pair, response in itertools.chain.from_iterable(
        ((pair, pair.responses[0].ids), (pair, pair.responses[1].ids)) for pair in pairs
    ):
        ids = torch.tensor([[*pair.prompt_ids, *response[:-1]]])
        found.append(list(model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits))
    return found


def balance_of(logits: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Fractions of choices and mean softmax by expert, from the definition."""
    softmax = torch.softmax(logits, dim=-1)
    choices = torch.zeros(logits.shape[1], dtype=torch.float64)
    for row in logits:
        for expert in torch.topk(row, chosen).indices:
            choices[expert] += 1
    return choices / choices.sum(), softmax.mean(dim=0)


def exact_term(model: Any, pairs: list[Example], kind: str) -> Tensor:
    sequences, chosen = exact_logits(model, pairs), int(model.config.num_experts_per_tok)
    total = torch.zeros((), dtype=torch.float64)
    for layer in range(len(sequences[0])):
        parts = [sequence[layer] for sequence in sequences]
        if kind == "global_batch":
            fractions, softmax = balance_of(torch.cat(parts), chosen)
            total = total + COEFFICIENT * len(fractions) * (fractions * softmax).sum()
            continue
        for part in parts:
            fractions, softmax = balance_of(part, chosen)
            total = total + COEFFICIENT * len(fractions) * (fractions * softmax).sum() / len(parts)
    return total


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe_plain"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("kind", ["global_batch", "sequence"])
def test_gradient_of_the_term(directory: Path, kind: Any, share_prompt: bool, one_process: ParallelGroups) -> None:
    model = build(directory, one_process).train()
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    pairs = make_pairs(model.architecture.vocab_size)
    rows = rows_with_membership(pairs, share_prompt=share_prompt)
    settings = ModelConfig(moe_aux_loss=kind, moe_aux_loss_coefficient=COEFFICIENT)
    load = ExpertLoad([model], model.architecture, settings, one_process)
    with load.counted(), torch.no_grad():
        run_rows(model.eval(), rows)
    with load.balanced(step_of(rows)), load.counted():
        for hidden in run_rows(model.train(), rows):
            (0 * hidden.sum()).backward()
    expected = exact_term(theirs, pairs, kind)
    assert load.metrics()["moe/aux_loss"] == pytest.approx(float(expected), rel=1e-6)
    expected.backward()
    experts = FAMILIES[model.architecture.model_type].experts
    assert experts is not None
    exact = {
        name: parameter.grad[selection]
        for stored, parameter in theirs.named_parameters()
        if parameter.grad is not None
        for name, selection, _ in separate_experts(stored, tuple(parameter.shape), experts)
    }
    for _, parameter, rule, place in _targets(model, model.architecture):
        assert rule is not None
        if parameter.grad is None:
            continue
        for name, ours in zip(rule.hf_names(place), separate(rule, parameter.grad, model.architecture), strict=True):
            if name in exact:
                assert (ours.double() - exact[name]).norm() <= 2e-5 * exact[name].norm() + 1e-9, name


def test_what_is_counted(directory: Path, one_process: ParallelGroups) -> None:
    """Padding is not, a shared prompt is twice, and no choice is lost."""
    model = build(directory, one_process).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    pairs, experts = make_pairs(model.architecture.vocab_size), model.architecture.experts
    assert experts is not None
    load = ExpertLoad([model], model.architecture, ModelConfig(), one_process)
    with load.counted(), torch.no_grad():
        run_rows(model, rows_with_membership(pairs, share_prompt=True))
    found, busiest, balances, entropies = load.metrics(), [], [], []
    with torch.no_grad():
        sequences = exact_logits(theirs, pairs)
    for layer in range(model.architecture.num_layers):
        logits = torch.cat([sequence[layer] for sequence in sequences])
        fractions, softmax = balance_of(logits, experts.per_token)
        busiest.append(float(fractions.max() * experts.number))
        balances.append(float(experts.number * (fractions * softmax).sum()))
        entropies.append(float(torch.distributions.Categorical(logits=logits).entropy().mean()))
    layers = len(busiest)
    assert found["moe/max_over_mean"] == pytest.approx(sum(busiest) / layers, rel=1e-9)
    assert found["moe/max_over_mean_worst"] == pytest.approx(max(busiest), rel=1e-9)
    assert found["moe/balance"] == pytest.approx(sum(balances) / layers, rel=1e-6)
    assert found["moe/entropy"] == pytest.approx(sum(entropies) / layers, rel=1e-6)
    assert found["moe/dropped"] == 0
    assert found["moe/aux_loss"] == 0


def test_membership() -> None:
    """By hand: prompts of 2 and 1 tokens, responses of 3, 1 and 2, 2, whose last tokens are not fed; padding."""
    pairs = [Example.pair("a", [1, 2], [3, 4, 5], [6]), Example.pair("b", [1], [2, 3], [4, 5])]
    row = pack_examples(pairs, [0, 1], share_prompt=True, pad_to_multiple=8, pad_id=0)
    assert sequence_membership(row).int().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0, 1, 0],
    ]
    unshared = pack_examples(pairs[1:], [0], share_prompt=False)
    assert sequence_membership(unshared).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_a_frozen_router(directory: Path, one_process: ParallelGroups) -> None:
    from nemo_lmpo.model.build import build_model_chunks
    from nemo_lmpo.model.kernels import Kernels

    (model,) = build_model_chunks(
        read_architecture(directory),
        ModelConfig(moe_freeze_router=True),
        groups=one_process,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kernels=Kernels(transformer_engine=False, attention="sdpa"),
    )
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"decoder.layers.{layer}.mlp.router.weight" for layer in range(2)]


@pytest.mark.parametrize("described", [SimpleNamespace, functools.partial(functools.partial, dict)])
def test_each_megatron_core_gets_the_router(described: Any) -> None:
    """A mixture's layer is described by a spec in megatron-core 0.16, and by a class with arguments in 0.19."""
    submodules = SimpleNamespace(router=None, experts="kept")
    names: Any = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_", "input_layernorm.": "kept"}
    spec: Any = SimpleNamespace(
        submodules=SimpleNamespace(mlp=described(submodules=submodules), sharded_state_dict_keys_map=names)
    )
    use_balanced_routers(spec)
    assert vars(submodules) == {"router": BalancedRouter, "experts": "kept"}
    assert spec.submodules.sharded_state_dict_keys_map == {"input_layernorm.": "kept"}

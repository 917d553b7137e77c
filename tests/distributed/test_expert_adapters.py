"""Adapters on the experts of a mixture: gradients by the chain rule, every layout, PEFT's form, resume."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.answers.engine import transformers_model
from nemo_lmpo.convert.command import nemo_to_hf
from nemo_lmpo.formats.families import FAMILIES
from nemo_lmpo.formats.fused_experts import separate_experts
from nemo_lmpo.formats.lora_targets import PROJECTIONS, hf_module
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.mixture_runs import EP, RELATIVE, TP, run
from tests.distributed.test_lora import LORA, SIMPO, adapters_of
from tests.distributed.training_runs import COMMON, metrics_of
from tests.distributed.workers import run_workers

ETP, OPTIMIZER = ("model.expert_tensor_parallel_size=2",), ("optim.use_distributed_optimizer=true",)
FULL = ("model.activations_checkpoint_granularity=full",)
# The rate must not follow the run's length, which differs; rates ten times as large make more of what is rounded.
TRAINED = (*LORA, "optim.sched.name=constant", "optim.lr=1e-3")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    # Whole experts on ranks that compute other tokens.
    "tp2": (2, (*TP, *FULL)),
    "dp2_ep2_optimizer": (2, (*EP, *OPTIMIZER)),
    "dp2_etp2": (2, ETP),
    "tp2_dp2_ep2_etp2_optimizer": (4, (*TP, *EP, *ETP, *OPTIMIZER)),
}


def assert_same_adapters(found: Path, expected: Path) -> None:
    lines, wanted = ([line for line in metrics_of(directory) if "loss" in line] for directory in (found, expected))
    for line, right in zip(lines, wanted, strict=True):
        for name in {"loss", "rewards/margins", "grad_norm", "moe/entropy"} & right.keys():
            assert line[name] == pytest.approx(right[name], rel=1e-5, abs=1e-6), name
    ours, theirs = adapters_of(found, 3), adapters_of(expected, 3)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        error = torch.linalg.vector_norm(ours[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error < RELATIVE, f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(1, tmp_path_factory.mktemp("one") / "run", TRAINED)


def test_all_have_learned(one_process: Path) -> None:
    found = adapters_of(one_process, 3)
    assert len(found) == 2 * (4 + 8 * 3) * 2  # two layers; attention, and eight experts
    assert all(tensor.abs().max() > 0 for tensor in found.values())
    starts = [tensor for name, tensor in found.items() if "experts" in name and name.endswith("up_proj.weight.A")]
    assert len({float(tensor[0, 0]) for tensor in starts}) == len(starts)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same_adapters(layout: str, one_process: Path, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    assert_same_adapters(run(world_size, tmp_path / "run", (*TRAINED, *overrides)), one_process)


def test_resumes_in_other_layouts(one_process: Path, tmp_path: Path) -> None:
    """Each step on other ranks: one, experts apart, experts cut."""
    for step, (world_size, layout) in enumerate([(1, ()), (2, (*EP, *OPTIMIZER)), (2, (*TP, *ETP))], start=1):
        run(world_size, tmp_path / "run", (*TRAINED, *layout, f"trainer.max_steps={step}"))
    assert_same_adapters(tmp_path / "run", one_process)


def write_base(directory: Path, family: str) -> Path:
    """A random mixture with the tokenizer of the generated task."""
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

    from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    common: dict[str, Any] = {
        **{"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.2},
    }
    config = {
        "mixtral": lambda: MixtralConfig(**common, intermediate_size=40, num_local_experts=4, sliding_window=None),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common, intermediate_size=40, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=2
        ),
    }[family]()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def train_and_score(launch: LaunchInfo, base: str, run_dir: str) -> list[Any]:
    """Train; log-probabilities of every token of three pairs by the model as it lies here."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session
    from tests.unit.model.test_model_against_transformers import make_pairs, rows_of, token_logps

    with open_session(load_recipe("lmpo_moe_tiny", [*COMMON, *start(base, run_dir), *LORA]), launch) as session:
        session.train(time.time())
        model = session.policy.models[0].eval()
        with torch.no_grad():
            found = token_logps(model, rows_of(make_pairs(model.architecture.vocab_size), share_prompt=True))
        return [logps.numpy() for logps in found]


def start(base: str, run_dir: str) -> tuple[str, ...]:
    return (f"run_dir={run_dir}", "model.architecture=null", f"model.restore_from_path={base}", "trainer.num_threads=1")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_merged_and_peft_exports_answer_alike(family: str, tmp_path: Path) -> None:
    """In the installed transformers, which keeps a layer's experts in one tensor, and in 4.57, which does not."""
    from transformers import AutoModelForCausalLM

    from tests.unit.model.test_model_against_transformers import exact_token_logps, make_pairs

    peft = pytest.importorskip("peft")
    base, merged, adapter = write_base(tmp_path / "base", family), tmp_path / "merged", tmp_path / "adapter"
    (ours,) = run_workers(1, train_and_score, str(base), str(tmp_path / "run"))
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_0000003")
    assert nemo_to_hf(["--input", checkpoint, "--output", str(merged), "--quiet"]) == 0
    assert nemo_to_hf(["--input", checkpoint, "--output", str(adapter), "--adapter", "--quiet"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    pairs = make_pairs(plain.config.vocab_size)
    with torch.no_grad():
        before = exact_token_logps(plain, pairs)
        found = {
            "merged": exact_token_logps(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), pairs),
            "peft": exact_token_logps(peft.PeftModel.from_pretrained(plain, adapter), pairs),
            # What peft saved is a model for every command.
            "read": exact_token_logps(transformers_model(open_model(adapter), torch.float32), pairs),
        }
    assert max(float((a - b).abs().max()) for a, b in zip(before, found["merged"], strict=True)) > 1e-2
    for name, theirs in found.items():
        for logps, exact in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.from_numpy(logps).double(), exact, rtol=1e-5, atol=1e-5, msg=name)


def first_step(launch: LaunchInfo, base: str, run_dir: str) -> dict[str, Any]:
    """The first step's loss and gradients of adapters that are not at their start, and the token ids of its pairs."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    settings = [*COMMON, *start(base, run_dir), *LORA, *SIMPO, "model.global_batch_size=3"]
    config = load_recipe("lmpo_moe_tiny", settings)
    with open_session(config, launch) as session:
        policy = session.policy
        batch = session.steps.builder.build(session.data.train, session.steps.sampler.pairs_of_step(0))
        named = [entry for a in policy.models[0].lora.by_linear.values() for entry in a.named_tensors()]
        with torch.no_grad():  # at B = 0 the gradient of A would be zero
            for name, parameter, _ in named:
                generator = torch.Generator().manual_seed(len(name) + parameter.numel())
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        policy.prepare_for_training_step()
        outcome = policy.get_loss_and_metrics(batch, forward_only=False)
        pairs = [session.data.train[int(index)] for index in session.steps.sampler.pairs_of_step(0)]
        return {
            "loss": outcome.loss,
            "adapters": {name: parameter.detach().numpy() for name, parameter, _ in named},
            "gradients": {name: parameter.main_grad.numpy() for name, parameter, _ in named},
            "pairs": [(pair.prompt_ids, *(response.ids for response in pair.responses)) for pair in pairs],
        }


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_gradients_by_the_chain_rule(family: str, tmp_path: Path) -> None:
    """Of ``W + s B A`` in transformers' model, with the gradient G of the loss by it: s B^T G and s G A^T."""
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", family)
    (found,) = run_workers(1, first_step, str(base), str(tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    names, sides = (
        FAMILIES[family].experts,
        {name: torch.from_numpy(a).double() for name, a in found["adapters"].items()},
    )
    assert names is not None
    weights = {
        name: (parameter, selection)
        for stored, parameter in model.named_parameters()
        for name, selection, _ in separate_experts(stored, tuple(parameter.shape), names)
    }
    adapted = list(places(sides))
    assert len(adapted) == 2 * (4 + 3 * model.config.num_local_experts)
    scale = 2.0  # alpha 8 over rank 4
    with torch.no_grad():
        for layer, projection, expert, index in adapted:
            parameter, selection = weights[f"{hf_module(layer, projection, names, expert)}.weight"]
            down, up = (sides[f"layers.{layer}.{projection}.{side}"][index] for side in ("lora_A", "lora_B"))
            parameter[selection or ...] += scale * up @ down
    loss = simpo(model, found["pairs"])
    loss.backward()
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    for layer, projection, expert, index in adapted:
        parameter, selection = weights[f"{hf_module(layer, projection, names, expert)}.weight"]
        key = f"layers.{layer}.{projection}."
        by_weight = parameter.grad[selection or ...]
        down, up = sides[f"{key}lora_A"][index], sides[f"{key}lora_B"][index]
        for side, exact in (("lora_A", scale * up.T @ by_weight), ("lora_B", scale * by_weight @ down.T)):
            ours = torch.from_numpy(found["gradients"][key + side])[index].double()
            assert (ours - exact).norm() <= 2e-5 * exact.norm() + 1e-8, f"{key}{side} of expert {expert}"


def places(sides: dict[str, torch.Tensor]) -> Iterator[tuple[int, str, int, tuple[int, ...]]]:
    """Layer, projection, expert, and where in the stacked tensor, of every adapter."""
    for name, tensor in sides.items():
        _, layer, projection, side = name.split(".")
        assert projection in PROJECTIONS
        if side == "lora_A":
            for expert in range(len(tensor) if tensor.dim() == 3 else 1):
                yield int(layer), projection, expert, (expert,) if tensor.dim() == 3 else ()


def simpo(model: torch.nn.Module, pairs: list[tuple[list[int], ...]]) -> torch.Tensor:
    """SimPO, whose loss is a line, with beta 2 and gamma 1."""
    losses = []
    for prompt, chosen, rejected in pairs:
        means = []
        for response in (chosen, rejected):
            ids = torch.tensor([prompt + response])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            means.append(logps.mean())
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (means[0] - means[1]) - 1.0))
    return torch.stack(losses).mean()

"""Low-rank adapters: the losses, gradients and adapters of PEFT, and the same from every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from nemo_lmpo.convert.command import nemo_to_hf
from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.formats.model_files import open_adapters, open_model
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.training_runs import COMMON, metrics_of, train
from tests.distributed.workers import run_workers

LORA = ("model.peft.name=lora", "model.peft.rank=4", "model.peft.alpha=8", "optim.lr=1e-2")
SIMPO = ("loss=simpo", "loss.beta=2.0", "loss.gamma=1.0")
TP2_SP = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
LAYOUTS = {
    "tp2": (2, ("model.tensor_model_parallel_size=2",)),
    "tp2_sp_full": (2, (*TP2_SP, "model.activations_checkpoint_granularity=full")),
    "pp2": (2, ("model.pipeline_model_parallel_size=2",)),
    "dp2_distributed": (2, ("optim.use_distributed_optimizer=true", "optim.overlap_grad_reduce=true")),
    "dp2_fsdp": (2, ("model.fsdp=true",)),
    "tp2_dp2_fsdp_full": (4, (*TP2_SP, "model.fsdp=true", "model.activations_checkpoint_granularity=full")),
    "cp2": (2, ("model.context_parallel_size=2",)),
}


def adapters_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """By the name of the weight, and side."""
    adapters, _ = open_adapters(run_dir / "checkpoints" / f"step_{step:07d}")
    found = {}
    for name in adapters.changed():
        found[f"{name}.A"], found[f"{name}.B"] = adapters.pair_of(name)
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    run_workers(1, train, str(run), LORA)
    return run


def test_checkpoints_hold_adapters_only(one_process: Path) -> None:
    state = one_process / "checkpoints" / "step_0000003" / "state"
    from nemo_lmpo.formats.archive import DirectoryFiles
    from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint

    stored = DistributedCheckpoint(DirectoryFiles(state), "").tensors
    assert all(".lora." in name for name in stored if "model" in name)
    sides = adapters_of(one_process, 3)
    assert len(sides) == 4 * 7 * 2  # four layers, seven projections
    assert all(tensor.abs().max() > 0 for tensor in sides.values())
    described = json.loads((one_process / "checkpoints" / "step_0000003" / "adapter.json").read_text())
    assert (described["rank"], described["alpha"]) == (4, 8.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same_adapters(layout: str, one_process: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    run_workers(world, train, str(tmp_path / "run"), (*LORA, *overrides))
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(one_process), strict=True):
        for name in {"loss", "rewards/margins", "grad_norm", "val/loss"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
    expected = adapters_of(one_process, 3)
    for name, tensor in adapters_of(tmp_path / "run", 3).items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


def test_resumes_in_another_layout(one_process: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_workers(1, train, str(run), (*LORA, "trainer.max_steps=2", "checkpoint.keep_last=3"))
    run_workers(2, train, str(run), (*LORA, *TP2_SP, "trainer.max_steps=3"))
    expected = adapters_of(one_process, 3)
    # The schedule's length differs (2 steps against 3), so only a whole run of one length is compared exactly.
    found = adapters_of(run, 3)
    assert found.keys() == expected.keys()
    assert [line["step"] for line in metrics_of(run) if "loss" in line] == [1, 2, 3]
    assert all(torch.isfinite(tensor).all() for tensor in found.values())


def peft_steps(launch: LaunchInfo, recipe: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The first step's loss and gradients here, and the token ids of its pairs."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    config = load_recipe(recipe, [*LORA, *SIMPO, *overrides])
    with open_session(config, launch) as session:
        indices = session.steps.sampler.pairs_of_step(0)
        batch = session.steps.builder.build(session.data.train, indices)
        adapters = session.policy.models[0].lora
        with torch.no_grad():  # at B = 0 the gradient of A would be zero
            for adapter in adapters.by_linear.values():
                for name, parameter, _ in adapter.named_tensors():
                    generator = torch.Generator().manual_seed(len(name) + parameter.numel())
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        session.policy.prepare_for_training_step()
        outcome = session.policy.get_loss_and_metrics(batch, forward_only=False)
        named = [entry for adapter in adapters.by_linear.values() for entry in adapter.named_tensors()]
        pairs = [session.data.train[int(index)] for index in indices]
        return {
            "loss": outcome.loss,
            "adapters": {name: parameter.detach().numpy() for name, parameter, _ in named},
            "gradients": {name: parameter.main_grad.numpy() for name, parameter, _ in named},
            "frozen": [name for name, p in session.policy.models[0].named_parameters() if not p.requires_grad],
            "buffers": sum(b.grad_data.numel() for b in cast(Any, session.policy.chunks[0]).buffers),
            "pairs": [(pair.prompt_ids, *(response.ids for response in pair.responses)) for pair in pairs],
        }


def test_equals_peft(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base)
    where = (f"model.restore_from_path={base}", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}")
    (found,) = run_workers(1, peft_steps, "lmpo_tiny", (*COMMON, *where))
    assert found["buffers"] < 1.2 * sum(array.size for array in found["gradients"].values())
    assert len(found["frozen"]) > 20
    compare_with_peft(base, found)


@pytest.mark.slow
def test_equals_peft_on_smollm2(smollm2_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    settings = (
        f"model.restore_from_path={smollm2_dir}",
        f"data.train.path={shared_dir / 'data' / 'alpaca_pairs_train.jsonl.gz'}",
        "data.train.limit=16",
        "data.validation.path=null",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "model.global_batch_size=2",
        "data.max_length=96",
        "data.max_prompt_length=48",
        "trainer.precision='32'",
        "trainer.max_steps=2",
    )
    (found,) = run_workers(1, peft_steps, "lmpo_smollm2_135m", settings, timeout=300)
    compare_with_peft(smollm2_dir, found)


def compare_with_peft(base: Path, found: dict[str, Any]) -> None:
    """The same adapters on transformers' model by PEFT; SimPO, whose loss is a line."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    by_name = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parts = name.split(".")
            layer, projection, side = parts[parts.index("layers") + 1], parts[-4], parts[-3]
            by_name[f"layers.{layer}.{projection}.{side}"] = parameter
    assert by_name.keys() == found["adapters"].keys()
    with torch.no_grad():
        for name, tensor in found["adapters"].items():
            by_name[name].copy_(torch.from_numpy(tensor))
    losses = []
    for prompt, chosen, rejected in found["pairs"]:
        means = []
        for response in (chosen, rejected):
            ids = torch.tensor([prompt + response])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            means.append(logps.mean())
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (means[0] - means[1]) - 1.0))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found["loss"] == pytest.approx(float(loss), abs=1e-5)
    for name, gradient in found["gradients"].items():
        expected = by_name[name].grad
        slack = 1e-5 + 1e-4 * float(expected.abs().max())
        assert torch.allclose(torch.from_numpy(gradient), expected, atol=slack), name


def write_base(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_merged_and_peft_exports_answer_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, run = tmp_path / "base", tmp_path / "run"
    write_base(base)
    where = (f"model.restore_from_path={base}", f"data.cache_dir={tmp_path / 'cache'}")
    run_workers(1, train, str(run), (*LORA, *where), str(tmp_path / "policy.nemo"))
    checkpoint = run / "checkpoints" / "step_0000003"
    assert nemo_to_hf(["--input", str(checkpoint), "--output", str(tmp_path / "merged"), "--quiet"]) == 0
    assert nemo_to_hf(["--input", str(checkpoint), "--output", str(tmp_path / "adapter"), "--adapter", "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "adapter_config.json"} <= names
    assert "config.json" not in names
    for name in names & {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}:
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes(), name
    ids = torch.tensor([[5, 9, 12, 7, 3, 21, 8]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids).logits
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
        assert torch.allclose(merged(ids).logits, adapted, atol=1e-4)
        assert (adapted - before).abs().max() > 1e-2
    archive = open_model(tmp_path / "policy.nemo").source
    for name, tensor in merged.state_dict().items():
        if name in archive.names():
            assert torch.allclose(archive.get(name), tensor, atol=1e-6), name
    # Another base under the same path is noticed.
    write_base(base)
    other = AutoModelForCausalLM.from_pretrained(base)
    other.model.norm.weight.data.add_(1.0)
    other.save_pretrained(base)
    with pytest.raises(CheckpointError, match="its weights are others now"):
        open_model(checkpoint)


def test_adapters_of_random_weights_stay_here(
    one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other program has their base; the merged model is whole."""
    checkpoint = str(one_process / "checkpoints" / "step_0000003")
    assert nemo_to_hf(["--input", checkpoint, "--output", str(tmp_path / "adapter"), "--adapter", "--quiet"]) == 1
    assert "holds adapters of random weights, which no other program has" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert nemo_to_hf(["--input", checkpoint, "--output", str(tmp_path / "merged"), "--quiet"]) == 0


def dpo(launch: LaunchInfo, run_dir: str, overrides: tuple[str, ...]) -> None:
    from nemo_lmpo import training
    from nemo_lmpo.config.recipe import load_recipe

    training.run(load_recipe("dpo_tiny", [*COMMON, *LORA, f"run_dir={run_dir}", *overrides]), launch)


def test_the_reference_is_the_policy_without_adapters(tmp_path: Path) -> None:
    data = ("data.train.limit=60", f"data.cache_dir={tmp_path / 'cache'}")
    run_workers(1, dpo, str(tmp_path / "cached"), data)
    run_workers(1, dpo, str(tmp_path / "off"), (*data, "model.reference_in_memory=true"))
    cached, off = metrics_of(tmp_path / "cached"), metrics_of(tmp_path / "off")
    assert cached[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert cached[2]["loss"] != pytest.approx(cached[0]["loss"], abs=1e-4)
    for ours, theirs in zip(off, cached, strict=True):
        for name in {"loss", "rewards/chosen"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.peft.target_modules=[query]", r"target_modules names 'query', which no layer has; choose of q_proj"),
        ("model.peft.rank=0", r"model\.peft\.rank=0 must be at least 1"),
        ("model.peft.name=dora", r"model\.peft\.name='dora'"),
        ("model.peft.target_modules=[]", "names no projection"),
    ],
)
def test_bad_settings_are_a_sentence(override: str, message: str) -> None:
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.config.rules import check_settings

    with pytest.raises(ConfigError, match=message):
        check_settings(load_recipe("lmpo_tiny", [*LORA, override]))

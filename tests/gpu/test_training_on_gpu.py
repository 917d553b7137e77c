"""The kernels that only GPUs have, against the local spec in float32 on the same weights and pairs."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
import torch

from nemo_lmpo.runtime.launch import LaunchInfo

STEPS = 10
SMALL = (
    "model.global_batch_size=16",
    "data.validation.limit=16",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=0",
    "checkpoint.save_interval=0",
    "logging.tensorboard=false",
    "logging.report=false",
)
FLOAT32 = ("trainer.precision='32'", "model.transformer_engine=false", "model.attention_backend=sdpa")
BF16 = ("trainer.precision=bf16",)
TE = ("model.transformer_engine=true",)
UNPACKED = ("model.micro_batch_size=1",)
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)


Gradients = dict[str, torch.Tensor]


def gradients_by_name(model: torch.nn.Module) -> Gradients:
    """Float32 gradients under the names of Transformer Engine's layers, which the local spec's map to."""
    from nemo_lmpo.formats.mapping import LOCAL_SPEC_NAMES

    result = {}
    for name, parameter in model.named_parameters():
        for local, fused in LOCAL_SPEC_NAMES.items():
            name = name.removesuffix(local) + fused if name.endswith(local) else name
        result[name] = parameter.main_grad.float().cpu().clone()
    return result


def train(directory: Path, *overrides: str) -> tuple[list[dict[str, float]], torch.Tensor, Gradients]:
    """Metrics of each step, and of the first batch before training: sums of log-probabilities, and gradients."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.loss.running_statistics import RunningStatistics
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_tiny", [*SMALL, f"run_dir={directory}", *overrides])
    with open_session(config, LaunchInfo()) as session:
        batch = session.batches.build(session.data.train, session.sampler.pairs_of_step(0))
        session.policy.prepare_for_training_step()
        session.policy.get_loss_and_metrics(batch, forward_only=False)
        table = session.policy.micro_batch_step.pairs
        sums = torch.stack([table.column("logps/chosen_sum"), table.column("logps/rejected_sum")]).cpu()
        gradients = gradients_by_name(session.policy.models[0])
        # The look at the first batch must not count as a step.
        fresh = RunningStatistics(session.policy.loss.statistics)
        session.policy.statistics.load_state_dict(fresh.state_dict())
        trainer = session.trainer()
        metrics = []
        for step in range(STEPS):
            metrics.append(trainer.train_step(step))
            trainer.progress.step += 1
        return metrics, sums, gradients


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory):
    return train(tmp_path_factory.mktemp("exact"), *FLOAT32)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(BF16 + FLOAT32[1:], id="local"),
        pytest.param(BF16 + FLOAT32[1:] + UNPACKED, id="local_unpacked"),
        pytest.param((*BF16, *TE), id="te", marks=needs_te),
        pytest.param((*BF16, *TE, *UNPACKED), id="te_unpacked", marks=needs_te),
        pytest.param((*BF16, *TE, "model.attention_backend=te"), id="te_attention", marks=needs_te),
    ],
)
def test_bf16_follows_float32(overrides: tuple[str, ...], exact, tmp_path: Path) -> None:
    """BF16 rounds to 2^-9 relative; a hidden state passes some ten roundings, which add up like a random walk."""
    metrics, sums, gradients = train(tmp_path / "run", *overrides)
    expected_metrics, expected_sums, expected_gradients = exact
    assert torch.allclose(sums, expected_sums, rtol=2e-2)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        distance = (gradients[name] - expected).norm() / expected.norm()
        assert distance < 5e-2, f"{name}: {distance:.1e}"
    losses = [line["loss"] for line in metrics]
    assert losses == pytest.approx([line["loss"] for line in expected_metrics], rel=5e-2)


@needs_te
def test_te_attention_equals_sdpa() -> None:
    """The same queries, keys and values through both attention modules, packed pairs with prefixes."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_lmpo.model.attention import PackedSDPA
    from nemo_lmpo.model.te_attention import PackedTEAttention
    from nemo_lmpo.parallel.context import attention_spans

    config = TransformerConfig(
        num_layers=1, hidden_size=512, num_attention_heads=8, num_query_groups=2, kv_channels=64, bf16=True
    )
    segments = torch.tensor([[0, 40, 0, 0], [40, 70, 0, 40], [110, 30, 0, 40], [140, 60, 0, 0]], dtype=torch.int32)
    spans = attention_spans(segments, 200, cp_rank=0, cp_size=1)
    torch.manual_seed(0)
    results = []
    inputs = [torch.randn(200, 1, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    for module in (PackedSDPA(config, 1), PackedTEAttention(config, 1)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = module(*leaves, spans)
        output.float().square().sum().backward()
        results.append([output.float(), *(leaf.grad.float() for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=3e-2, rtol=3e-2)


def test_speed_and_memory_of_smollm2(smollm2_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    """Prints what benchmarks/results/ records; asserts only that training runs and stays finite."""
    from nemo_lmpo.train import main

    data = shared_dir / "data" / "alpaca_pairs_train.jsonl.gz"
    torch.cuda.reset_peak_memory_stats()
    started = time.time()
    status = main(
        [
            "--config-name",
            "lmpo_smollm2_135m",
            f"model.restore_from_path={smollm2_dir}",
            f"data.train.path={data}",
            "trainer.precision=bf16",
            "trainer.max_steps=20",
            "logging.report=false",
            f"run_dir={tmp_path / 'run'}",
        ]
    )
    assert status == 0
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    print(f"{torch.cuda.get_device_name()}: {time.time() - started:.0f} s, last step {last}")

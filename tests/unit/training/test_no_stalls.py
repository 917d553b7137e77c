"""Forward and backward of a step read nothing back from the device, whatever the loss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.loss.registry import LOSSES, build_loss
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training import policy
from nemo_lmpo.training.pipeline import run_pipeline
from nemo_lmpo.training.session import TrainingSession, open_session
from nemo_lmpo.training.step import MicroBatchStep
from tests.flash_reference import flash_on_cpu
from tests.stalls import no_stalls, stalls

SETTINGS = (
    "model.global_batch_size=16",
    "data.row_tokens=200",
    "data.validation.limit=8",
    "trainer.max_steps=3",
    "logging.tensorboard=false",
    "logging.report=false",
)


@pytest.fixture(scope="module", params=[("sdpa", ()), ("flash", ("model.activations_checkpoint_granularity=full",))])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingSession]:
    """With each kind of attention, the second one's layers computed again in backward."""
    attention, further = request.param
    overrides = [*SETTINGS, *further, f"run_dir={tmp_path_factory.mktemp('stalls') / 'run'}"]
    with pytest.MonkeyPatch.context() as patch, flash_on_cpu() as calls:
        patch.setattr(policy, "choose_kernels", lambda *_, **__: Kernels(False, attention))
        with open_session(load_recipe("lmpo_tiny", overrides), LaunchInfo()) as opened:
            yield opened
        assert ("backward" in calls) == (attention == "flash")


def run(session: TrainingSession, step: MicroBatchStep) -> torch.Tensor:
    """Forward and backward over the first step's micro-batches; the pairs' values."""
    batch = session.steps.builder.build(session.data.train, session.steps.sampler.pairs_of_step(0))
    assert len(batch.micro_batches) > 1
    for micro_batch in batch.micro_batches:
        columns = 4 if step.shared_logps else 2
        micro_batch.reference_logps = torch.full((micro_batch.num_examples, columns), -30.0)
    session.policy.prepare_for_training_step()
    pairs = step.begin(batch.num_examples, mean_length=batch.mean_length)
    with no_stalls():
        run_pipeline(list(session.policy.chunks), batch.micro_batches, step.forward_step, forward_only=False)
    return pairs.values


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward_read_nothing(name: str, session: TrainingSession) -> None:
    loss = build_loss(parse_loss({"name": name}))
    step = MicroBatchStep(loss, session.groups, chunk_tokens=64, device=session.device)
    assert torch.isfinite(run(session, step)).all()
    gradients = [parameter.main_grad for parameter in session.policy.models[0].parameters()]
    assert all(gradient.any() for gradient in gradients)


def test_the_check_finds_what_it_should() -> None:
    values = torch.arange(3.0)
    with stalls() as found:
        values.sum().item()
        values.tolist()
        torch.nonzero(values)
        torch.tensor([1.0], device="cpu")
        values.to("cpu")
        assert bool(values[1] > 0)
        values.double().sum().sqrt()  # on the device
    names = sorted(what.split(" ")[0] for what in found.elements())
    assert names == ["_local_scalar_dense", "_local_scalar_dense", "nonzero", "tensor", "to", "tolist"]


def test_what_a_whole_step_reads(session: TrainingSession) -> None:
    """The metrics table and the gradient norm, once each; what follows the table's read works on the host."""
    trainer = session.trainer()
    trainer.train_step(0)
    with stalls() as found:
        trainer.train_step(1)
    # And the three numbers of the running statistics go to the device before forward begins.
    on_the_host = (
        "example_table.py",
        "pair_metrics.py",
        "running_statistics.py",
        "step_with_ready_grads",
        "interface.py",
    )
    reads = [(what, times) for what, times in found.items() if not any(place in what for place in on_the_host)]
    assert len(reads) == 1
    assert "get_grad_norm" in reads[0][0]
    assert reads[0][1] == 1
    assert sum(times for what, times in found.items() if what.startswith("cpu at")) == 1

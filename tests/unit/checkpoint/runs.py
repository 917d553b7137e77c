"""Small real runs for checkpoint tests: the session with its model, optimizer, data and margin statistics."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.process import distributed_session
from nemo_lmpo.training.session import TrainingSession
from nemo_lmpo.training.start_model import find_start_model

TINY = (
    "model.architecture.hidden_size=16",
    "model.architecture.intermediate_size=32",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=2",
    "model.global_batch_size=8",
    "data.train.limit=40",
    "data.validation.path=null",
    "trainer.max_steps=3",
    "trainer.val_check_interval=0",
    "trainer.num_threads=1",
    "checkpoint.save_interval=1",
    "checkpoint.keep_last=9",
    "optim.sched.name=constant",
    "optim.sched.warmup_fraction=0",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
)


@contextmanager
def one_process() -> Iterator[tuple[Any, torch.device]]:
    """Groups and device for any number of sessions."""
    with distributed_session(load_recipe("lmpo_tiny", TINY), LaunchInfo()) as (groups, device):
        yield groups, device


def open_session(place: tuple[Any, torch.device], run_dir: Path, *overrides: str) -> TrainingSession:
    """A session of the tiny run at step 0, as the training command makes it."""
    config = load_recipe("lmpo_tiny", [*TINY, f"run_dir={run_dir}", *overrides])
    run = RunDirectory(config)
    run.check_owner()
    run.create()
    return TrainingSession(config, find_start_model(config.model), run, LaunchInfo(), *place)


def train(place: tuple[Any, torch.device], run_dir: Path, *overrides: str) -> TrainingSession:
    """Train to the end; the session as it then is."""
    session = open_session(place, run_dir, *overrides)
    session.train(time.time())
    return session


def fingerprint(session: TrainingSession, *, counts: bool = True) -> str:
    """A hash of all that training continues from: weights, moments, step counts, margin statistics, random state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(session.policy.models[0].state_dict().items()):
        if isinstance(tensor, torch.Tensor) and not name.endswith("_extra_state"):
            digest.update(name.encode() + tensor.numpy().tobytes())
    for inner in session.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in sorted(inner.optimizer.state.get(parameter, {}).items()):
                    if key == "step" and not counts:
                        continue
                    digest.update(key.encode() + torch.as_tensor(value).detach().numpy().tobytes())
    assert session.policy.statistics is not None
    digest.update(json.dumps(session.policy.statistics.state_dict(), sort_keys=True).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }

"""What is set before torch starts, and the choice between GPUs and CPUs."""

from __future__ import annotations

import os

import pytest
import torch

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.environment import BEFORE_TORCH, order_kernels, prepare_environment, uses_gpu
from nemo_lmpo.runtime.launch import LaunchInfo


def test_variables_are_set_unless_the_user_did() -> None:
    environ: dict[str, str] = {}
    prepare_environment(environ)
    assert environ == BEFORE_TORCH
    own = {"OMP_WAIT_POLICY": "active", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    given = dict(own)
    prepare_environment(given)
    assert given == own, "the allocator's older name counts as set"


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("fsdp", "splits", "architecture", "given", "expected", "told"),
    [
        (False, True, 9, None, "1", None),
        (False, True, None, None, "1", None),  # no driver: as before there were other GPUs
        (False, True, 9, "8", "8", None),
        (False, True, 10, None, None, None),
        (False, True, 12, None, None, None),
        (True, False, 9, None, None, None),
        (True, True, 9, None, None, "hide less"),
        (True, True, 8, None, None, "hide less"),
        (True, True, 10, None, None, None),
        (True, True, 9, "1", "1", "unset it"),
        (True, False, None, "1", "1", "unset it"),
        (True, True, None, None, None, None),
    ],
)
def test_kernels_are_ordered_where_that_is_wanted(
    fsdp: bool, splits: bool, architecture: int | None, given: str | None, expected: str | None, told: str | None
) -> None:
    environ = {} if given is None else {CONNECTIONS: given}
    message = order_kernels(fsdp=fsdp, splits_layers=splits, architecture=architecture, environ=environ)
    assert environ.get(CONNECTIONS) == expected
    assert message is None if told is None else message is not None and told in message


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name in ("SLURM_PROCID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] != "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    return monkeypatch


def test_gpus_are_used_where_there_are_any(machine: pytest.MonkeyPatch) -> None:
    assert uses_gpu("auto", LaunchInfo(0, 2, 0, 2))
    assert uses_gpu("gpu", LaunchInfo())
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not uses_gpu("auto", LaunchInfo())


def test_cpu_hides_them(machine: pytest.MonkeyPatch) -> None:
    assert not uses_gpu("cpu", LaunchInfo(0, 8, 0, 8))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "what asks torch later, and child processes, find none either"
    machine.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=cpu, but .* start it with CUDA_VISIBLE_DEVICES="):
        uses_gpu("cpu", LaunchInfo())


def test_gpu_without_one_is_refused(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu, but .*CUDA_VISIBLE_DEVICES=''.*accelerator=cpu"):
        uses_gpu("gpu", LaunchInfo())
    machine.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built for CPUs only"):
        uses_gpu("gpu", LaunchInfo())


def test_more_processes_than_gpus_are_refused(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"4 processes on this machine share 2 GPU\(s\); start at most 2"):
        uses_gpu("auto", LaunchInfo(0, 4, 0, 4))


def test_srun_may_bind_one_gpu_to_each_task(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("CUDA_VISIBLE_DEVICES", "1")
    launch = LaunchInfo(1, 2, 1, 2)
    with pytest.raises(ConfigError, match="2 processes"):
        uses_gpu("auto", launch)
    machine.setenv("SLURM_PROCID", "1")
    assert uses_gpu("auto", launch)
    machine.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun inside a Slurm job binds nothing
    with pytest.raises(ConfigError, match="2 processes"):
        uses_gpu("auto", launch)

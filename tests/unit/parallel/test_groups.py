"""How a process joins the job: on its own GPU first, the group bound to none, and no gloo groups beside it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.parallel.groups import create_groups, destroy_groups, start_process_group, wait_for_all
from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.runtime.launch import LaunchInfo


def test_a_gpu_is_chosen_before_the_job_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **options: done.append((given, options)))
    start_process_group(LaunchInfo(6, 8, local_rank=2, local_world_size=4), use_cuda=True, timeout_minutes=2)
    device, (given, options) = done
    assert device == 2
    assert given == ("nccl",)
    assert options == {"rank": 6, "world_size": 8, "timeout": timedelta(minutes=2)}, "no device_id: decision 5"


def test_no_group_is_of_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's would need an address of every host that the others reach, which 127.0.1.1 is not."""
    backends: list[object] = []
    make = dist.new_group

    def new_group(*given: Any, backend: object = None, **options: Any) -> Any:
        backends.append(backend)
        return make(*given, **{"backend": backend, **options})

    monkeypatch.setattr(dist, "new_group", new_group)
    with on_cpu():
        start_process_group(LaunchInfo(), use_cuda=False)
        try:
            create_groups(ModelConfig())
            wait_for_all(torch.device("cpu"))
        finally:
            destroy_groups()
    assert backends
    assert set(backends) <= {None, ""}


def test_the_barrier_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[object] = []
    monkeypatch.setattr(dist, "barrier", lambda *, device_ids: named.append(device_ids))
    wait_for_all(torch.device("cuda", 3))
    wait_for_all(torch.device("cpu"))
    assert named == [[3], None]

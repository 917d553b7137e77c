"""The doctor's checks pass on a right machine and fail on injected faults."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_lmpo.doctor import machine
from nemo_lmpo.doctor.findings import Finding, page, verdict
from nemo_lmpo.doctor.parity import TOLERANCE, attention_values, distance, parity
from nemo_lmpo.model.attention import PackedSDPA
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.parallel.logprobs import VocabularyPart
from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.runtime.launch import LaunchInfo

CPU = torch.device("cpu")
SDPA = Kernels(transformer_engine=False, attention="sdpa")


def checked(dtype: torch.dtype, kernels: Kernels = SDPA) -> dict[str, Finding]:
    with on_cpu():
        return {finding.subject: finding for finding in parity(kernels, CPU, dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    found = checked(dtype)
    assert list(found) == ["attention (sdpa)", "log-probabilities", "optimizer"]
    assert {finding.kind for finding in found.values()} == {"good"}, page(list(found.values()))


def off_by_one(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries - 1) | (torch.arange(keys) == 0)

    return mask


def test_a_sliding_window() -> None:
    """Positions of answers continue those of their prompt, so a window reaches into it."""
    with on_cpu():
        pairs = attention_values(SDPA, CPU, torch.float32, window=16)
    assert max(distance(*pair) for pair in pairs) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_that_is_off_by_one_is_found(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_lmpo.model.attention as attention

    monkeypatch.setattr(attention, "lower_right_mask", off_by_one(attention.lower_right_mask))
    assert checked(dtype)["attention (sdpa)"].kind == "problem"


def test_heads_that_read_others_keys_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PackedSDPA.attend
    monkeypatch.setattr(PackedSDPA, "attend", lambda self, q, k, v, plan: attend(self, q, k.flip(1), v, plan))
    assert checked(torch.bfloat16)["attention (sdpa)"].kind == "problem"


def test_padding_that_takes_probability_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VocabularyPart, "hide_padding", lambda self, logits: logits)
    assert checked(torch.bfloat16)["log-probabilities"].kind == "problem"


def test_an_optimizer_without_decay_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.optimizer as optimizer

    right = optimizer.Adam
    monkeypatch.setattr(optimizer, "Adam", lambda *args, **kwargs: right(*args, **{**kwargs, "eps": 1e-2}))
    assert checked(torch.float32)["optimizer"].kind == "problem"


def test_a_kernel_that_cannot_run_is_a_problem() -> None:
    """Torch's flash kernel is not there on CPUs."""
    found = checked(torch.bfloat16, Kernels(transformer_engine=False, attention="flash", gpu=True))
    assert found["attention (flash)"].kind == "problem"
    assert "did not run" in found["attention (flash)"].text


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fact,) = machine.disk(tmp_path / "runs" / "not" / "there")
    assert fact.kind in ("fact", "note")
    monkeypatch.setattr(os, "access", lambda *args: False)
    (refused,) = machine.disk(tmp_path)
    assert refused.kind == "problem"


def test_job() -> None:
    assert [finding.text for finding in machine.job({})] == ["not in a job"]
    environ = {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": str(time.time() + 7200), "NCCL_DEBUG": "INFO", "HOME": "/"}
    found = {finding.subject: finding for finding in machine.job(environ)}
    assert set(found) == {"Slurm", "requeueing", "NCCL_DEBUG"}
    assert found["Slurm"].text.startswith("job 17")
    assert found["requeueing"].kind == "note"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    found = {finding.subject: finding for finding in machine.devices(LaunchInfo(local_world_size=2, world_size=2))}
    assert "989 TFLOP/s" in found["GPU 0"].text
    assert found["processes"].kind == "problem"


def test_the_page_and_its_verdict() -> None:
    findings = [Finding("a", "one", "fine", "good"), Finding("b", "two", "broken", "problem"), Finding("a", "x", "y")]
    text = page(findings)
    assert text.index("fine") < text.index("y") < text.index("broken"), "by section"
    assert verdict(findings) == "verdict: not fit for training; look at two"
    assert verdict(findings[:1]) == "verdict: fit for training; 1 checks passed"

"""Which kernels are chosen where, and what is said where they cannot run."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.model import kernels
from nemo_lmpo.model.kernels import Device, Kernels, choose_kernels, this_device
from nemo_lmpo.runtime.transformer_engine import TransformerEngine

CPU = Device(gpu=False)
V100 = Device(True, "Tesla V100-SXM2-32GB", (7, 0), flash=True)
A100 = Device(True, "NVIDIA A100-SXM4-80GB", (8, 0), flash=True)
H100 = Device(True, "NVIDIA H100 80GB HBM3", (9, 0), flash=True, cuda=(12, 6))
NO_FLASH = Device(True, "NVIDIA H100 80GB HBM3", (9, 0), flash=False)
NONE = TransformerEngine(problem="Transformer Engine is not installed (pip install it)")
TE = TransformerEngine("2.11.0")
OTHER_TE = TransformerEngine("2.20.2", warning="Transformer Engine 2.20.2 is outside of what megatron-core declares")
BROKEN = TransformerEngine("2.11.0", "Transformer Engine 2.11.0 is installed but broken: undefined symbol")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)


def choose(
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    engine: TransformerEngine = NONE,
    *,
    precision: str = "bf16",
    head_dim: int = 128,
    flash_attn: bool = False,
    **model: Any,
) -> Kernels:
    monkeypatch.setattr(kernels, "find_transformer_engine", lambda: engine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if flash_attn else None)
    return choose_kernels(ModelConfig(**model), precision=precision, head_dim=head_dim, device=device)


@pytest.mark.parametrize(
    ("device", "engine", "options", "layers", "attention", "te_kernel"),
    [
        (CPU, NONE, {}, False, "sdpa", None),
        (CPU, TE, {"precision": "32"}, False, "sdpa", None),  # installed on a login node
        (A100, NONE, {}, False, "flash", None),
        (A100, TE, {}, True, "flash", None),
        (H100, TE, {}, True, "flash", None),
        (H100, TE, {"precision": "32"}, True, "sdpa", None),
        (H100, TE, {"head_dim": 96}, True, "flash", None),
        (H100, TE, {"head_dim": 100}, True, "te", "fused"),
        (A100, TE, {"head_dim": 512}, True, "sdpa", None),
        (A100, TE, {"head_dim": 512, "flash_attn": True}, True, "te", "flash"),
        (NO_FLASH, TE, {}, True, "te", "fused"),
        (NO_FLASH, NONE, {}, False, "sdpa", None),
        (V100, NONE, {"precision": "32"}, False, "sdpa", None),
        (H100, OTHER_TE, {}, False, "flash", None),
        (H100, OTHER_TE, {"transformer_engine": True}, True, "flash", None),
        (H100, BROKEN, {}, False, "flash", None),
        (H100, TE, {"transformer_engine": False, "attention_backend": "te"}, False, "te", "fused"),
        (A100, NONE, {"attention_backend": "sdpa"}, False, "sdpa", None),
    ],
)
def test_choice(
    device: Device,
    engine: TransformerEngine,
    options: dict[str, Any],
    layers: bool,
    attention: str,
    te_kernel: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = choose(monkeypatch, device, engine, **options)
    assert (found.transformer_engine, found.attention, found.te_attention) == (layers, attention, te_kernel)
    assert found.gpu is device.gpu


@pytest.mark.parametrize(
    ("device", "engine", "options", "message"),
    [
        (
            V100,
            NONE,
            {},
            r"bf16 needs a GPU of compute capability 8.0 \(A100\) or newer, but Tesla V100.* has 7.0; set",
        ),
        (CPU, NONE, {"transformer_engine": True}, "transformer_engine=true, but there is no GPU; unset it"),
        (H100, NONE, {"transformer_engine": True}, "but Transformer Engine is not installed"),
        (H100, BROKEN, {"transformer_engine": True}, "is installed but broken: undefined symbol; unset it"),
        (CPU, NONE, {"attention_backend": "flash"}, "=flash cannot run here: there is no GPU; set it to auto"),
        (
            H100,
            NONE,
            {"attention_backend": "flash", "precision": "32"},
            "takes 16-bit numbers, not trainer.precision=32",
        ),
        (V100, NONE, {"attention_backend": "flash", "precision": "32"}, "takes 16-bit numbers"),
        (NO_FLASH, NONE, {"attention_backend": "flash"}, "this build of torch has no flash kernels"),
        (H100, NONE, {"attention_backend": "flash", "head_dim": 100}, "a multiple of 8 and at most 256.* have 100"),
        (H100, NONE, {"attention_backend": "te"}, "=te cannot run here: Transformer Engine is not installed"),
        (H100, TE, {"attention_backend": "te", "precision": "32"}, "16-bit numbers, not trainer.precision=32"),
        (A100, TE, {"attention_backend": "te"}, r"A100.*8\.0.* needs the package flash-attn.*cuDNN kernel needs 9\.0"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    device: Device,
    engine: TransformerEngine,
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(monkeypatch, device, engine, **options)


def test_switches_of_the_environment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core would end in an assertion."""
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    with pytest.raises(ConfigError, match="NVTE_FUSED_ATTN=0 is set in the environment, where 1 is needed"):
        choose(monkeypatch, H100, TE, attention_backend="te")
    assert choose(monkeypatch, H100, TE).attention == "flash"


def test_what_was_passed_over_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, H100, TE).reasons == ()
    assert choose(monkeypatch, CPU).reasons == ()
    (reason,) = choose(monkeypatch, H100, BROKEN).reasons
    assert reason == f"layers without Transformer Engine: {BROKEN.problem}"
    flash, te = choose(monkeypatch, NO_FLASH).reasons
    assert flash == "attention without flash: this build of torch has no flash kernels"
    assert te.startswith("attention without te: Transformer Engine is not installed")


def test_this_machine() -> None:
    assert this_device(use_cuda=False) == CPU


def test_fp8_and_overlapped_collectives_need_transformer_engine_and_fp8_an_h100(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(monkeypatch, H100, TE, fp8="tensorwise", tp_comm_overlap=True).transformer_engine
    assert choose(monkeypatch, A100, TE, tp_comm_overlap=True).transformer_engine
    assert choose(monkeypatch, replace(H100, cuda=(12, 9)), TE, fp8="blockwise").transformer_engine
    for device, engine, options, expected in (
        (A100, TE, {"fp8": "hybrid"}, r"model\.fp8=hybrid needs a GPU of compute capability 9\.0 .* has 8\.0; unset"),
        (H100, NONE, {"fp8": "blockwise"}, r"model\.fp8=blockwise needs Transformer Engine's layers: .* not installed"),
        (H100, TE, {"fp8": "blockwise"}, r"model\.fp8=blockwise needs .* CUDA 12\.9 or newer, and this one has 12\.6"),
        (H100, OTHER_TE, {"tp_comm_overlap": True}, r"model\.tp_comm_overlap=true needs .*2\.20\.2 is outside"),
        (CPU, NONE, {"fp8": "tensorwise"}, r"model\.fp8=tensorwise needs Transformer Engine's layers: there is no GPU"),
    ):
        with pytest.raises(ConfigError, match=expected):
            choose(monkeypatch, device, engine, **options)

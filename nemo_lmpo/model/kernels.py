"""Which kernels a run uses on the device it has, and why not others."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.model.flash_attention import HEAD_DIM_MULTIPLE, LARGEST_HEAD_DIM
from nemo_lmpo.runtime.transformer_engine import TransformerEngine, find_transformer_engine

_AMPERE, _HOPPER = (8, 0), (9, 0)
_BLOCKS_OF_FP8 = (12, 9)
"""The first CUDA whose products take FP8 in blocks; Transformer Engine asserts on it in the first step."""
_TE_SWITCHES = {"flash": "NVTE_FLASH_ATTN", "fused": "NVTE_FUSED_ATTN"}


@dataclass(frozen=True)
class Device:
    """What this process computes on."""

    gpu: bool
    name: str = "CPU"
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (8, 0) is an A100, (9, 0) an H100."""
    flash: bool = False
    """Whether torch was built with its flash kernels."""
    cuda: tuple[int, int] = (0, 0)
    """The version of CUDA that torch was built with."""


def this_device(*, use_cuda: bool) -> Device:
    """The current GPU, or the CPU."""
    if not use_cuda:
        return Device(gpu=False)
    return Device(
        gpu=True,
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        flash=torch.backends.cuda.is_flash_attention_available(),
        cuda=_version(torch.version.cuda),
    )


@dataclass(frozen=True)
class Kernels:
    """Which implementations a run uses."""

    transformer_engine: bool
    """Transformer Engine's layers instead of megatron-core's own."""
    attention: str
    """`flash`, `te` or `sdpa`."""
    gpu: bool = False
    """The fused forms that only GPUs have; off on CPUs."""
    te_attention: str | None = None
    """Which of its kernels Transformer Engine takes for attention: `flash` (flash-attention) or `fused` (cuDNN)."""
    reasons: tuple[str, ...] = ()
    """Why what is faster was not taken, a sentence each."""


def choose_kernels(model: ModelConfig, *, precision: str, head_dim: int, device: Device) -> Kernels:
    """Resolve `auto` settings for a device.

    Args:
        model: the settings.
        precision: `trainer.precision`.
        head_dim: channels of an attention head.
        device: from :func:`this_device`.

    Raises:
        ConfigError: what is asked for cannot run here; says why and what to do.
    """
    if precision == "bf16" and device.gpu and device.capability < _AMPERE:
        raise ConfigError(
            f"trainer.precision=bf16 needs a GPU of compute capability 8.0 (A100) or newer, but {device.name} has "
            f"{_dotted(device.capability)}; set trainer.precision='32'"
        )
    engine = find_transformer_engine() if device.gpu else TransformerEngine(problem="there is no GPU")
    layers, reasons = _layers(model, engine)
    _refuse_without_its_layers(model, device, engine, layers)
    attention, te_attention, attention_reasons = _attention(model, precision, head_dim, device, engine)
    return Kernels(layers, attention, device.gpu, te_attention, (*reasons, *attention_reasons))


def _layers(model: ModelConfig, engine: TransformerEngine) -> tuple[bool, list[str]]:
    """Whether layers are Transformer Engine's, and why not."""
    wanted = model.transformer_engine
    if wanted and not engine.usable:
        raise ConfigError(f"model.transformer_engine=true, but {engine.problem}; unset it or set it to false")
    if wanted is not None or engine.version is None:
        return bool(wanted), []
    if not engine.usable:
        return False, [f"layers without Transformer Engine: {engine.problem}"]
    if engine.warning is not None:
        return False, [f"layers without Transformer Engine: {engine.warning}; model.transformer_engine=true uses it"]
    return True, []


def _refuse_without_its_layers(model: ModelConfig, device: Device, engine: TransformerEngine, layers: bool) -> None:
    """Raise where settings need Transformer Engine's layers, or a device, that are not there."""
    wanted = {f"model.fp8={model.fp8}": model.fp8 is not None, "model.tp_comm_overlap=true": model.tp_comm_overlap}
    for setting in (name for name, on in wanted.items() if on):
        if not layers:
            reason = engine.problem or engine.warning or "model.transformer_engine=false"
            raise ConfigError(f"{setting} needs Transformer Engine's layers: {reason}; remove it")
    if model.fp8 is not None and device.capability < _HOPPER:
        raise ConfigError(
            f"model.fp8={model.fp8} needs a GPU of compute capability 9.0 (H100) or newer, but {device.name} has "
            f"{_dotted(device.capability)}; unset it"
        )
    if model.fp8 == "blockwise" and device.cuda < _BLOCKS_OF_FP8:
        raise ConfigError(
            f"model.fp8=blockwise needs a torch built with CUDA {_dotted(_BLOCKS_OF_FP8)} or newer, and this one has "
            f"{_dotted(device.cuda)}; choose model.fp8=hybrid, or install another torch"
        )


def _attention(
    model: ModelConfig, precision: str, head_dim: int, device: Device, engine: TransformerEngine
) -> tuple[str, str | None, list[str]]:
    wanted = model.attention_backend
    te_kernel, te_problem = te_attention_kernel(precision, device, engine)
    problems = {"flash": flash_problem(precision, head_dim, device), "te": te_problem, "sdpa": None}
    if wanted != "auto":
        if (problem := problems[wanted]) is not None:
            raise ConfigError(f"model.attention_backend={wanted} cannot run here: {problem}; set it to auto")
        return wanted, te_kernel if wanted == "te" else None, []
    chosen = next(name for name in ("flash", "te", "sdpa") if problems[name] is None)
    skipped = [f"attention without {name}: {problems[name]}" for name in ("flash", "te") if problems[name] is not None]
    if not device.gpu or chosen == "flash":
        skipped = []
    return chosen, te_kernel if chosen == "te" else None, skipped


def flash_problem(precision: str, head_dim: int, device: Device) -> str | None:
    """Why torch's flash kernel cannot run, or None."""
    if not device.gpu:
        return "there is no GPU"
    if precision != "bf16":
        return f"its kernel takes 16-bit numbers, not trainer.precision={precision}"
    if device.capability < _AMPERE:
        return f"its kernel needs compute capability 8.0 or newer, {device.name} has {_dotted(device.capability)}"
    if not device.flash:
        return "this build of torch has no flash kernels"
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > LARGEST_HEAD_DIM:
        return f"its kernel takes heads of a multiple of 8 and at most 256 channels, the model's have {head_dim}"
    return None


def te_attention_kernel(
    precision: str, device: Device, engine: TransformerEngine
) -> tuple[str, None] | tuple[None, str]:
    """Transformer Engine's kernel for spans of different lengths, or why it has none.

    Without a kernel it would raise, or (from 2.11 on) fall back to dense scores without a word.
    """
    if not device.gpu or not engine.usable:
        return None, str(engine.problem or "there is no GPU")
    if precision != "bf16":
        return None, f"its kernels take 16-bit numbers, not trainer.precision={precision}"
    kernel = "fused" if device.capability >= _HOPPER else "flash"
    if kernel == "flash" and importlib.util.find_spec("flash_attn") is None:
        return None, (
            f"on {device.name} (compute capability {_dotted(device.capability)}) it needs the package flash-attn, "
            f"which is not installed; its cuDNN kernel needs 9.0"
        )
    for name, switch in _TE_SWITCHES.items():
        wanted = "1" if name == kernel else "0"
        if os.environ.get(switch, wanted) != wanted:
            return None, f"{switch}={os.environ[switch]} is set in the environment, where {wanted} is needed"
    return kernel, None


def _version(text: str | None) -> tuple[int, int]:
    major, minor, *_ = (text or "0.0").split(".")
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"

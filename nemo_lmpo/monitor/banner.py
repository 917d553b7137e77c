"""What a run says at its start: versions, devices, layout, kernels and sizes."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.config.rules.layout import layout_line
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import printable
from nemo_lmpo.runtime.transformer_engine import installed_version

if TYPE_CHECKING:
    from nemo_lmpo.model.kernels import Kernels

# Shown if installed: the name people use, and the distributions that may carry it.
_PACKAGES = {
    "nemo_lmpo": ("nemo-lmpo", "nemo_lmpo"),
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "transformer-engine": ("transformer-engine", "transformer_engine"),
    "nemo": ("nemo-toolkit",),
    "transformers": ("transformers",),
    "flash-attention": ("flash-attn", "flash_attn_3", "flash-attn-3"),
}


@dataclass(frozen=True)
class DetectedKernels:
    """Kernel packages that are installed: a version, `installed` where there is none, or None."""

    transformer_engine: str | None = None
    apex: str | None = None
    flash_attention: str | None = None


@dataclass(frozen=True)
class BannerFacts:
    """Everything the banner shows."""

    config: Config
    run_dir: str
    devices: str
    """For example `4 x NVIDIA A100-SXM4-80GB` or `CPU, 1 process of 2 threads`."""
    world_size: int
    parameters: int
    """Of the whole model."""
    parameters_per_rank: int
    total_steps: int
    data_parallel: int = 1
    start_step: int = 0
    examples: str = "pairs"
    """What a step is made of."""
    """Finished steps of the checkpoint that is resumed."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """What is used for what, from :func:`kernels_in_use`."""
    reasons: Sequence[str] = ()
    """Why what is faster is not used, a sentence each."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """From :func:`package_versions`."""


def _spec(name: str) -> ModuleSpec | None:
    """Of a top-level module, found without importing it."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _package_dirs(name: str) -> list[Path]:
    spec = _spec(name)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _detect_transformer_engine() -> str | None:
    # The `transformer-engine` distribution alone has no torch extension and cannot be used.
    places = _package_dirs("transformer_engine")
    has_extension = _spec("transformer_engine_torch") or any(
        next(place.rglob("transformer_engine_torch*"), None) for place in places
    )
    if not (places and has_extension):
        return None
    return installed_version("transformer-engine", "transformer_engine", "transformer_engine_torch") or "installed"


def _detect_apex() -> str | None:
    # PyPI's `apex` is a web toolkit: NVIDIA's has optimizers, and its fused ones need the extension amp_C.
    # `find_spec("apex.optimizers")` would import the parent package, so the directory is looked at instead.
    is_nvidia = any((place / "optimizers").is_dir() for place in _package_dirs("apex"))
    return (installed_version("apex") or "installed") if is_nvidia and _spec("amp_C") else None


def detect_kernels() -> DetectedKernels:
    """Which kernel packages are installed and usable; imports none of them."""
    has_flash = _spec("flash_attn") or _spec("flash_attn_interface")
    return DetectedKernels(
        transformer_engine=_detect_transformer_engine(),
        apex=_detect_apex(),
        flash_attention=(installed_version(*_PACKAGES["flash-attention"]) or "installed") if has_flash else None,
    )


def kernels_in_use(detected: DetectedKernels, kernels: Kernels, *, moments_dtype: str = "32") -> dict[str, str]:
    """What layers, attention and optimizer of the chosen ``kernels`` run on, given those that are installed.

    Args:
        detected: what is installed.
        kernels: what was chosen.
        moments_dtype: `optim.moments_dtype`.
    """
    te = f"Transformer Engine {detected.transformer_engine}"
    attention = "torch flash, one call per layer" if kernels.attention == "flash" else "torch SDPA"
    if kernels.attention == "te":
        flash = f", flash-attention {detected.flash_attention}" if detected.flash_attention else ""
        attention = f"{te} (cuDNN{flash})"
    # megatron-core takes the first fused Adam that it can import, in this order.
    optimizer = "torch AdamW"
    if moments_dtype == "bf16":
        optimizer = "torch AdamW, bfloat16 moments"
    elif kernels.gpu and detected.transformer_engine:
        optimizer = f"{te} FusedAdam"
    elif kernels.gpu and detected.apex:
        optimizer = f"apex {detected.apex} FusedAdam"
    return {"layers": te if kernels.transformer_engine else "torch", "attention": attention, "optimizer": optimizer}


def package_versions() -> dict[str, str]:
    """Versions of what a run stands on, of the installed ones only; read from metadata, nothing is imported."""
    from nemo_lmpo import __version__

    versions = {name: installed_version(*distributions) for name, distributions in _PACKAGES.items()}
    versions["nemo_lmpo"] = __version__  # a source tree that is not installed has no metadata
    versions["apex"] = _detect_apex()
    return {name: version for name, version in versions.items() if version}


def format_count(number: int) -> str:
    """A parameter count as people say it: `134.5 M`, `8.03 B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.1f} {unit}" if scaled >= 100 else f"{scaled:.2f} {unit}"
    return str(number)


def _layout(facts: BannerFacts) -> str:
    model = facts.config.model
    noun = "process" if facts.world_size == 1 else "processes"
    more = (", sequence parallel" if model.sequence_parallel else "") + (", FSDP" if model.fsdp else "")
    return f"{layout_line(model, facts.data_parallel)} = {facts.world_size} {noun}{more}"


def _lines(text: str, width: int) -> list[str]:
    """Lines of whole words."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [text]


def _wrap(items: list[str], width: int) -> list[str]:
    """Lines of whole items."""
    text = ", ".join(item.replace(" ", "\xa0") for item in items)  # not a place to break
    return [line.replace("\xa0", " ") for line in textwrap.wrap(text, width, break_on_hyphens=False)]


def render_banner(facts: BannerFacts, width: int = 80) -> str:
    """The banner as aligned lines, without a trailing newline."""
    steps = f"{facts.total_steps:,} of {facts.config.model.global_batch_size:,} {facts.examples}"
    if facts.start_step:
        steps += f", resumed after step {facts.start_step:,}"
    per_rank = f"{format_count(facts.parameters_per_rank)} per process"
    rows: list[tuple[str, list[str]]] = [
        ("recipe", [facts.config.name]),
        ("run directory", [facts.run_dir]),
        ("devices", [facts.devices]),
        ("layout", [_layout(facts)]),
        ("precision", [facts.config.trainer.precision]),
        ("parameters", [f"{format_count(facts.parameters)} ({facts.parameters:,}), {per_rank}"]),
        ("steps", [steps]),
    ]
    rows += [(name, [value]) for name, value in facts.kernels.items()]
    label_width = max(len(label) for label, _ in rows) + 2
    room = width - label_width - 2
    # Not a path, which must stay whole to be copied.
    rows = [(name, values if name == "run directory" else _lines(values[0], room)) for name, values in rows]
    if facts.reasons:
        rows.append(("why", [line for reason in facts.reasons for line in _lines(reason, room)]))
    if facts.versions:
        rows.append(("versions", _wrap([f"{name} {version}" for name, version in facts.versions.items()], room)))
    lines = []
    for label, values in rows:
        for index, value in enumerate(values):
            lines.append(f"  {label if index == 0 else '':<{label_width}}{printable(value)}")
    rule = "-" * min(width, max(len(line) for line in lines) + 2)
    return "\n".join([rule, *lines, rule])

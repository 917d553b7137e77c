from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.config.schema import Config, ModelConfig, TrainerConfig
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.monitor.banner import (
    BannerFacts,
    DetectedKernels,
    detect_kernels,
    format_count,
    kernels_in_use,
    package_versions,
    render_banner,
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A directory of made-up packages in front of the installed ones."""
    monkeypatch.syspath_prepend(tmp_path)
    # A run on CPUs in this process has hidden Transformer Engine from imports.
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)

    def add(*paths: Any) -> None:
        for path in paths:
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # Importing any of these would show.
            target.write_text("raise RuntimeError('imported')")
        importlib.invalidate_caches()

    return add


def add_distribution(tmp_path: Path, name: str, version: str) -> None:
    folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_apex_of_pypi_is_not_nvidias(site: Callable[..., Any], tmp_path: Path) -> None:
    site("apex/__init__.py", "apex/models.py")
    add_distribution(tmp_path, "apex", "0.9.10.dev0")
    assert detect_kernels().apex is None
    assert "apex" not in package_versions()


def test_apex_without_its_fused_extension_does_not_count(site: Callable[..., Any]) -> None:
    site("apex/__init__.py", "apex/optimizers/__init__.py")
    assert detect_kernels().apex is None


def test_nvidias_apex_is_found_without_importing_it(site: Callable[..., Any], tmp_path: Path) -> None:
    site("apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py")
    add_distribution(tmp_path, "apex", "0.1")
    assert detect_kernels().apex == "0.1"
    assert package_versions()["apex"] == "0.1"


def test_transformer_engine_needs_its_torch_extension(site: Callable[..., Any], tmp_path: Path) -> None:
    site("transformer_engine/__init__.py")
    add_distribution(tmp_path, "transformer-engine", "2.8.0")
    assert detect_kernels().transformer_engine is None
    site("transformer_engine_torch.py")
    assert detect_kernels().transformer_engine == "2.8.0"


def test_flash_attention(site: Callable[..., Any], tmp_path: Path) -> None:
    site("flash_attn/__init__.py")
    assert detect_kernels().flash_attention == "installed"
    add_distribution(tmp_path, "flash-attn", "2.7.4")
    assert detect_kernels().flash_attention == "2.7.4"


def test_versions_hold_installed_packages_only() -> None:
    versions = package_versions()
    assert {"nemo_lmpo", "torch", "megatron-core"} <= versions.keys()
    assert None not in versions.values()


@pytest.mark.parametrize(
    ("detected", "cuda", "te", "backend", "layers", "attention", "optimizer"),
    [
        (DetectedKernels(), False, False, "sdpa", "torch", "torch SDPA", "torch AdamW"),
        (DetectedKernels("2.8", "0.1", None), False, False, "sdpa", "torch", "torch SDPA", "torch AdamW"),
        (DetectedKernels(None, "0.1", None), True, False, "sdpa", "torch", "torch SDPA", "apex 0.1 FusedAdam"),
        (DetectedKernels(), True, False, "flash", "torch", "torch flash, one call per layer", "torch AdamW"),
        (
            DetectedKernels("2.8", "0.1", "2.7"),
            True,
            True,
            "te",
            "Transformer Engine 2.8",
            "Transformer Engine 2.8 (cuDNN, flash-attention 2.7)",
            "Transformer Engine 2.8 FusedAdam",
        ),
    ],
)
def test_kernels_in_use(
    detected: DetectedKernels, cuda: bool, te: bool, backend: str, layers: str, attention: str, optimizer: str
) -> None:
    used = kernels_in_use(detected, Kernels(te, backend, gpu=cuda))
    assert used == {"layers": layers, "attention": attention, "optimizer": optimizer}
    rounded = kernels_in_use(detected, Kernels(te, backend, gpu=cuda), moments_dtype="bf16")
    assert rounded["optimizer"] == "torch AdamW, bfloat16 moments"


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (51_200, "51.20 K"), (134_515_008, "134.5 M"), (8_030_261_248, "8.03 B")]
)
def test_counts(number: int, text: str) -> None:
    assert format_count(number) == text


def test_banner_says_that_weights_are_shared() -> None:
    config = Config(name="tiny", model=ModelConfig(sequence_parallel=True, fsdp=True))
    facts = BannerFacts(config, "runs/tiny", "CPU", 2, 10, 5, 3, data_parallel=2)
    assert "DP 2 = 2 processes, sequence parallel, FSDP" in render_banner(facts, width=100)


def test_banner() -> None:
    model = ModelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
        sequence_parallel=True,
        global_batch_size=128,
    )
    facts = BannerFacts(
        config=Config(name="lmpo_llama3_8b", model=model, trainer=TrainerConfig(precision="bf16")),
        run_dir="runs/lmpo_llama3_8b",
        devices="8 x NVIDIA A100-SXM4-80GB",
        world_size=8,
        parameters=8_030_261_248,
        parameters_per_rank=2_007_565_312,
        total_steps=1478,
        data_parallel=2,
        start_step=100,
        kernels={"attention": "torch SDPA"},
        reasons=["attention without flash: its kernel takes 16-bit numbers, not trainer.precision=32", "one more"],
        versions={"nemo_lmpo": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1", "nemo": "3.0.0"},
    )
    assert render_banner(facts, width=60).splitlines() == [
        "-" * 60,
        "  recipe         lmpo_llama3_8b",
        "  run directory  runs/lmpo_llama3_8b",
        "  devices        8 x NVIDIA A100-SXM4-80GB",
        "  layout         TP 2 x PP 2 (VPP 4) x CP 1 x DP 2 = 8",
        "                 processes, sequence parallel",
        "  precision      bf16",
        "  parameters     8.03 B (8,030,261,248), 2.01 B per process",
        "  steps          1,478 of 128 pairs, resumed after step 100",
        "  attention      torch SDPA",
        "  why            attention without flash: its kernel takes",
        "                 16-bit numbers, not trainer.precision=32",
        "                 one more",
        "  versions       nemo_lmpo 0.1.0, torch 2.13.0,",
        "                 megatron-core 0.16.1, nemo 3.0.0",
        "-" * 60,
    ]

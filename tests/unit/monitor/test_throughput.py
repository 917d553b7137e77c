from __future__ import annotations

from typing import Any

import pytest

from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.monitor.throughput import peak_memory_gib, throughput_metrics
from nemo_lmpo.sizing.cards import peak_flops
from nemo_lmpo.sizing.flops import causal_pairs, model_flops


def architecture(**changes: Any) -> Architecture:
    sizes = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "ffn_hidden_size": 20,
        "num_layers": 3,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    return Architecture(**{**sizes, **changes})


def allowed_pairs(length: int, prefix: int, window: int | None) -> int:
    """Counted from the mask, key by key."""
    keys_of = [range(prefix + query + 1) for query in range(length)]
    return sum(len(keys) if window is None else min(len(keys), window) for keys in keys_of)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9, 100])
@pytest.mark.parametrize("prefix", [0, 2, 7])
@pytest.mark.parametrize("length", [0, 1, 4, 10])
def test_causal_pairs_match_the_mask(length: int, prefix: int, window: int | None) -> None:
    assert causal_pairs(length, prefix, window) == allowed_pairs(length, prefix, window)


def test_model_flops_by_hand() -> None:
    # A layer: q 8x8, k and v 8x4 each, output 8x8, three 8x20: 64 + 64 + 64 + 480 = 672 weights.
    # Layers: 6 * 3 * 672 * 10 tokens = 120960. Output: 6 * 8 * 100 * 4 = 19200. Attention: 12 * 3 * 8 * 30 = 8640.
    flops = model_flops(architecture(), tokens=10, predicted_tokens=4, attended=30)
    assert flops == 120960 + 19200 + 8640


def test_model_flops_of_one_causal_sequence_is_the_default() -> None:
    # Output: 6 * 800 * 10 = 48000. Pairs: 10 * 11 / 2 = 55, with a window of 4: 1 + 2 + 3 + 7 * 4 = 34.
    assert model_flops(architecture(), tokens=10) == 120960 + 48000 + 12 * 3 * 8 * 55
    assert model_flops(architecture(sliding_window=4), tokens=10) == 120960 + 48000 + 12 * 3 * 8 * 34


def test_model_flops_of_llama3_8b_is_near_six_times_its_weights() -> None:
    llama = architecture(
        vocab_size=128256, hidden_size=4096, ffn_hidden_size=14336, num_layers=32, num_attention_heads=32,
        num_query_groups=8, head_dim=128,
    )  # fmt: skip
    # 8.03e9 parameters less the 0.525e9 of the input embedding, which multiplies nothing; 6 * 7.505e9 = 4.503e10.
    assert model_flops(llama, tokens=1, attended=0) == pytest.approx(4.503e10, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("NVIDIA B300 SXM6 AC", 2.25e15),
        ("NVIDIA GB300", 2.5e15),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 503.8e12),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
        (None, None),
    ],
)
def test_peaks(name: str | None, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_throughput_and_utilisation() -> None:
    # 4 s on 8 devices of 312 TFLOP/s could do 9.984e15 operations; 4.992e15 were done: one half.
    metrics = throughput_metrics(
        examples=128, tokens=100_000, seconds=4.0, flops=4.992e15, devices=8, device_peak_flops=312e12
    )
    assert metrics == {"pairs_per_second": 32.0, "tokens_per_second": 25_000.0, "mfu": pytest.approx(0.5)}


def test_no_utilisation_without_a_peak() -> None:
    metrics = throughput_metrics(examples=2, tokens=10, seconds=0.5, flops=1e9, device_peak_flops=peak_flops(None))
    assert metrics == {"pairs_per_second": 4.0, "tokens_per_second": 20.0}


def test_peak_memory_here() -> None:
    assert peak_memory_gib() > 0

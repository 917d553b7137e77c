"""How fast a run is: pairs and tokens a second, model FLOPs and their share of the hardware's peak, memory.

Model FLOPs are what forward and backward need by the mathematics of the model, with two operations for a
multiply-add and a backward pass of twice the forward pass:

- `6 * N * tokens` for the `N` weights of all matrices inside the layers;
- `6 * hidden * vocabulary * predicted_tokens` for the output matrix, which only positions that predict a
  response token meet;
- `12 * layers * heads * head_dim * attended_pairs` for attention: `q k` and `p v` are `2 * head_dim`
  operations each for every (query, key) pair that the mask lets through, times three for the backward pass.

Activation recomputation, padding and the pairs a kernel computes only to mask them are not model FLOPs, so
they lower the utilisation (MFU). Tokens are those really computed: a shared prompt counts once.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

from nemo_lmpo.config.architecture import Architecture
from nemo_lmpo.plan.amounts import shape_of

GIB = 2**30

# Dense BF16 FLOP/s of one device by the vendor's data sheets (V100: FP16, it has no BF16), first match wins.
# Names are those of torch.cuda.get_device_name, for example "NVIDIA A100-SXM4-80GB".
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),  # a slice of a GPU, whose share the name does not tell
    (r"\bGB200\b", 2.5e15),
    (r"\bB200\b", 2.25e15),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bG?H200\b|\bH100\b|\bH800\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b|\bA800\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bV100\b", 125e12),
)


def peak_flops(device_name: str | None) -> float | None:
    """Dense BF16 FLOP/s of one device by its CUDA name; None when unknown, or for the CPU (no name)."""
    for pattern, flops in _PEAK_FLOPS:
        if device_name is not None and re.search(pattern, device_name):
            return flops or None
    return None


def causal_pairs(length: int, prefix: int = 0, window: int | None = None) -> int:
    """(Query, key) pairs of a segment that attends to a whole prefix and causally to itself.

    Args:
        length: queries, each of which also is a key for itself and later queries.
        prefix: keys in front of the segment that all of its queries attend to.
        window: at most this many newest keys a query (sliding window), itself included.
    """
    if window is None:
        return length * prefix + length * (length + 1) // 2
    growing = min(length, max(0, window - prefix))
    return growing * prefix + growing * (growing + 1) // 2 + (length - growing) * window


def model_flops(
    architecture: Architecture,
    *,
    tokens: int,
    predicted_tokens: int | None = None,
    attended: int | None = None,
) -> float:
    """FLOPs of one training step, forward and backward, over all devices.

    Args:
        architecture: sizes of the decoder.
        tokens: positions that went through the layers.
        predicted_tokens: positions that met the output matrix; unset: all.
        attended: (query, key) pairs, as `batches.attended_pairs` counts them; unset: ``tokens`` as one causal sequence.
    """
    predicted = tokens if predicted_tokens is None else predicted_tokens
    pairs = causal_pairs(tokens, window=architecture.sliding_window) if attended is None else attended
    return shape_of(architecture).model_flops(tokens, predicted, pairs)


def throughput_metrics(
    *,
    pairs: int,
    tokens: int,
    seconds: float,
    flops: float | None = None,
    devices: int = 1,
    device_peak_flops: float | None = None,
) -> dict[str, float]:
    """`pairs_per_second`, `tokens_per_second` and, where the peak is known, `mfu` of one step.

    Args:
        pairs: preference pairs over all devices.
        tokens: computed tokens over all devices.
        seconds: wall time of the step.
        flops: model FLOPs over all devices.
        devices: number of devices (all of tensor, pipeline, context and data parallelism).
        device_peak_flops: peak of one device, from :func:`peak_flops`.
    """
    elapsed = max(seconds, 1e-9)
    metrics = {"pairs_per_second": pairs / elapsed, "tokens_per_second": tokens / elapsed}
    if flops is not None and device_peak_flops:
        metrics["mfu"] = flops / (elapsed * devices * device_peak_flops)
    return metrics


def _peak_resident_bytes() -> int:
    # Linux: getrusage would give a process started by a large one its parent's peak; VmHWM starts anew.
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), flags=re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_gib() -> float:
    """Peak memory of this process so far: allocated on the current CUDA device, else resident in main memory."""
    import torch  # here: the functions above are used where torch is not loaded

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return _peak_resident_bytes() / GIB

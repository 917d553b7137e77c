"""How fast a run is: pairs and tokens per second, the share of the hardware's peak (MFU), memory."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

from nemo_lmpo.runtime.files import GIB


def throughput_metrics(
    *,
    examples: int,
    tokens: int,
    seconds: float,
    flops: float | None = None,
    devices: int = 1,
    device_peak_flops: float | None = None,
    kind: str = "pairs",
) -> dict[str, float]:
    """`pairs_per_second` (or that of the other kinds) and `tokens_per_second`; `mfu` where the peak is known.

    Args:
        examples: pairs, conversations or answers over all devices.
        tokens: computed tokens over all devices.
        seconds: wall time of the step.
        flops: model FLOPs over all devices.
        devices: number of devices (all of tensor, pipeline, context and data parallelism).
        device_peak_flops: peak of one device, from :func:`peak_flops`.
        kind: what the examples are, `pairs`, `conversations` or `answers`.
    """
    elapsed = max(seconds, 1e-9)
    metrics = {f"{kind}_per_second": examples / elapsed, "tokens_per_second": tokens / elapsed}
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

"""Stands in for the calls that torch makes into CUDA; `torch.cuda` above them is torch's own Python.

What is kept true: a thread begins on device 0, choosing a stream chooses its device, leaving a stream goes back to the
one before, and whatever is done on a device makes a context there.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

MEMORY = 80 * 2**30
_CUDA = 1
"""torch's number for the kind of device."""


@dataclass(frozen=True)
class Call:
    """A call that makes a context on ``device`` if there is none yet."""

    thread: str
    name: str
    device: int


@dataclass
class Driver:
    """GPUs of a machine as one process sees them."""

    devices: int = 1
    calls: list[Call] = field(default_factory=list)
    current_bytes: int = 0
    peak_bytes: int = 0
    sync_debug_mode: int = 0
    counter: Any = None
    """What looks at every tensor, where memory is counted."""
    ranges: int = 0
    """Profiler ranges that are open."""

    def __post_init__(self) -> None:
        self._of_thread = threading.local()
        self._streams = 0

    def as_new(self) -> None:
        """Be as in a process that has not used a GPU yet."""
        import torch

        cuda: Any = torch.cuda
        cuda._initialized = False
        self.calls.clear()
        self._of_thread = threading.local()

    @property
    def device(self) -> int:
        """The calling thread's."""
        return int(getattr(self._of_thread, "device", 0))

    def use(self, name: str, device: int | None = None) -> int:
        """Note that the calling thread works on a device; on its own one by default."""
        device = self.device if device is None else device
        self.calls.append(Call(threading.current_thread().name, name, device))
        return device

    def count(self) -> int:
        """How many GPUs this process may see."""
        import os

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return self.devices if visible is None else min(self.devices, len([one for one in visible.split(",") if one]))

    def set_device(self, device: int) -> None:
        """`cudaSetDevice`."""
        if not 0 <= device < self.count():
            raise RuntimeError(f"CUDA error: invalid device ordinal {device}")
        import torch

        torch.cuda.init()
        self._of_thread.device = device
        self.use("set_device")

    def exchange_device(self, device: int) -> int:
        """Set the device and give the one before; -1 leaves it."""
        before = self.device
        if device >= 0:
            self.set_device(device)
        return before

    def current_stream(self, device: int) -> tuple[int, int, int]:
        """Number, device and kind of device of the stream that the calling thread's work goes to."""
        return self._chosen().get(device, 0), device, _CUDA

    def set_stream(self, *, stream_id: int, device_index: int, device_type: int) -> None:
        """Choose a stream, and with it its device."""
        if device_index != self.device:
            self.set_device(device_index)
        self._chosen()[device_index] = stream_id

    def new_stream(self) -> tuple[int, int]:
        """Number and device of a further stream."""
        self._streams += 1
        return self._streams, self.use("new_stream")

    def memory_stats(self, device: int) -> dict[str, Any]:
        """Allocated and reserved bytes in the allocator's form."""
        both = {"all": {"current": self.current_bytes, "peak": self.peak_bytes}}
        return {"allocated_bytes": both, "reserved_bytes": both}

    def reset_peak(self, device: int) -> None:
        """Count the peak anew."""
        self.peak_bytes = self.current_bytes

    def allocated(self, change: int) -> None:
        """Memory was taken, or given back."""
        self.current_bytes += change
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def properties(self, device: int) -> SimpleNamespace:
        """An H100's."""
        return SimpleNamespace(
            name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=MEMORY, multi_processor_count=132, warp_size=32
        )

    def push_range(self, message: str) -> int:
        """Begin a profiler's range."""
        self.ranges += 1
        return self.ranges

    def pop_range(self) -> int:
        """End it."""
        assert self.ranges > 0, "a range ends that was not begun"
        self.ranges -= 1
        return self.ranges

    def _chosen(self) -> dict[int, int]:
        if not hasattr(self._of_thread, "streams"):
            self._of_thread.streams = {}
        chosen: dict[int, int] = self._of_thread.streams
        return chosen

    def replacements(self) -> dict[str, Any]:
        """By the names that `torch._C` has in a build for CUDA."""

        def set_sync_debug_mode(mode: int) -> None:
            self.sync_debug_mode = mode

        def dump_memory(*arguments: object) -> dict[str, list[Any]]:
            return {"segments": [], "device_traces": [], "external_annotations": []}

        return {
            "_cuda_getDeviceCount": self.count,
            "_cuda_init": lambda: None,
            "_cuda_isInBadFork": lambda: False,
            "_cuda_hasPrimaryContext": lambda device: any(call.device == device for call in self.calls),
            "_cuda_getDevice": lambda: self.device,
            "_cuda_setDevice": self.set_device,
            "_cuda_exchangeDevice": self.exchange_device,
            "_cuda_maybeExchangeDevice": self.exchange_device,
            "_cuda_getCurrentStream": self.current_stream,
            "_cuda_getDefaultStream": lambda device: (0, device, _CUDA),
            "_cuda_setStream": self.set_stream,
            "_cuda_synchronize": lambda: self.use("synchronize") and None,
            "_cuda_memoryStats": self.memory_stats,
            "_cuda_resetPeakMemoryStats": self.reset_peak,
            "_cuda_emptyCache": lambda: None,
            "_cuda_set_sync_debug_mode": set_sync_debug_mode,
            "_cuda_get_sync_debug_mode": lambda: self.sync_debug_mode,
            "_cuda_record_memory_history": lambda *arguments, **named: None,
            "_cuda_memorySnapshot": dump_memory,
            "_is_flash_attention_available": lambda: True,
        }

"""Finds what would make the host wait for a GPU: reads of values, and copies between host and device.

On a machine without GPU there is one kind of memory, so a copy shows as a call that names a device. On a GPU
:func:`no_stalls` uses torch's own check.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result's value or shape the host has to know.
READS = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "equal", "is_nonzero", "masked_select", "_unique2",
    "unique_consecutive", "unique_dim", "bincount", "repeat_interleave",
}  # fmt: skip
_READS_ALL = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
# With a device: copies between host and device, and of Python numbers, which block.
_FROM_THE_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.to, torch.Tensor.cuda}
_ROOT = Path(__file__).resolve().parent.parent


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in READS:
            self.found[f"{name} at {_place()}"] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = [kwargs.get("device"), *(args[1:2] if func is torch.Tensor.to else ())]
        moves = any(isinstance(device, torch.device | str | int) for device in named) and func in _FROM_THE_HOST
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
            moves = False  # a tensor on its own device stays there
        if func in _READS_ALL or moves:
            self.found[f"{func.__name__} at {_place()}"] += 1
        return func(*args, **kwargs)


def _place() -> str:
    """The innermost line that is not torch's, this file's or the CPU adapter's."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        passes_on = path == Path(__file__).resolve() or path.name == "cpu_adapter.py" or "torch" in path.parts
        if not passes_on and not frame.filename.startswith("<"):
            short = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-3:])
            return f"{short}:{frame.lineno} {frame.name}"
    return "?"


@contextmanager
def stalls() -> Iterator[Counter[str]]:
    """What would stall inside a block: operation and place, and how often."""
    found: Counter[str] = Counter()
    with _Operations(found), _Methods(found):
        yield found


@contextmanager
def no_stalls() -> Iterator[None]:
    """Fails where the host would wait: by torch's check on a GPU, by :func:`stalls` elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with stalls() as found:
        yield
    assert not found, "the host would wait for the device:\n" + "\n".join(f"{n} x {what}" for what, n in found.items())

"""Tensors "on a GPU" that are tensors of the CPU, and what torch does with them there only on GPUs."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.rehearsal.driver import Driver

ASK_FOR_A_GPU = ("nemo_lmpo.", "transformer_engine.")
"""Modules that are told that their tensors lie on a GPU; torch's and megatron-core's own would call its kernels."""
_CPU = torch.device("cpu")


def is_gpu(device: Any) -> bool:
    """Whether an argument names a GPU; a bare number does in torch."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


class OnCpu(TorchFunctionMode):
    """Answers calls of torch that name a GPU, or that only a GPU has, on the CPU."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.driver.count() == 0:  # a run on the CPU of a machine with GPUs
            return func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.cuda:
            self.driver.use("cuda", self._index(*args[1:2]))
            return args[0]
        if func is torch.Tensor.pin_memory:
            self.driver.use("pin_memory")
            return args[0]
        if is_gpu(kwargs.get("device")):
            self.driver.use(func.__name__, self._index(kwargs["device"]))
            kwargs["device"] = _CPU
        if func is torch.Tensor.to and any(is_gpu(arg) for arg in args[1:2]):
            self.driver.use("to", self._index(args[1]))
            args = (args[0], _CPU, *args[2:])
        if kwargs.get("pin_memory"):
            del kwargs["pin_memory"]
        if func is torch.device and args and type(args[0]) is int:
            return torch.device("cuda", args[0])
        return func(*args, **kwargs)

    def _index(self, device: Any = None) -> int | None:
        """A device's number; None: the thread's own."""
        if isinstance(device, int):
            return device
        return None if device is None else torch.device(device).index


@contextmanager
def wide_products() -> Iterator[None]:
    """Register for CPUs the products of 16-bit matrices whose float32 sums are handed out as they are.

    A product of two such numbers has 16 significant bits, so that float32 holds it exactly.
    """

    def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        return left.to(dtype) @ right.to(dtype)

    def add_product(
        total: Tensor,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: Tensor,
    ) -> Tensor:
        return out.copy_(beta * total + alpha * product(left, right, dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", product, "CPU")
        library.impl("addmm.dtype_out", add_product, "CPU")
        yield


class LiveBytes(TorchDispatchMode):
    """Tells the driver of the memory that tensors take, and when they go."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.driver = driver
        self._known: set[int] = set()
        self._in_kernel = False

    def __enter__(self) -> LiveBytes:
        self.driver.counter = self
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.driver.counter = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._in_kernel:
            self._add_all(result)
        return result

    def one_kernel(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call what is one kernel on a GPU: what it makes on the way stays in registers there."""
        before, self._in_kernel = self._in_kernel, True
        try:
            result = function(*arguments, **named)
        finally:
            self._in_kernel = before
        self._add_all(result)
        return result

    def _add_all(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # torch keeps the object as long as the memory
        if key in self._known:
            return
        self._known.add(key)
        size = -(-storage.nbytes() // 512) * 512  # what the allocator gives out
        self.driver.allocated(size)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.driver.allocated(-size)


def is_cuda() -> bool:
    """`Tensor.is_cuda`: yes to those who ask in order to choose a kernel."""
    asking: str = sys._getframe(2).f_globals.get("__name__", "")
    return asking.startswith(ASK_FOR_A_GPU)

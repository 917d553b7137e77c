"""What a program does on fake tensors: memory that is alive, and work.

The meter is a dispatch mode above :class:`FakeTensorMode`: it sees every operator, with shapes and without values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_lmpo.sizing.work import Product, Work

_NO_KERNEL = frozenset(
    {
        *("view", "_unsafe_view", "_reshape_alias", "slice", "transpose", "squeeze", "unsqueeze", "detach", "alias"),
        *("permute", "select", "expand", "t", "as_strided", "split", "split_with_sizes", "unbind", "chunk", "narrow"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_", "resize_"),
        *("_has_compatible_shallow_copy_type", "is_same_size", "unfold", "_local_scalar_dense", "scalar_tensor"),
        *("promote_types", "_record_function_enter_new", "_record_function_exit"),
    }
)
"""Operators that only make another view, or memory without content."""
_KERNELS_EACH = {
    "_flash_attention_backward": 5,
    "_varlen_attn_backward": 5,
    "_scaled_dot_product_flash_attention_backward": 5,
}
"""Flash attention's backward clears and adds up its gradients around the main kernel."""
_ATTENTION = frozenset(
    {
        *("_flash_attention_forward", "_flash_attention_backward", "_varlen_attn", "_varlen_attn_backward"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    }
)
_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "_allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
}
"""Beginnings of the collectives' names; a receive is some other rank's send."""


@dataclass
class _Storage:
    """Memory that is alive."""

    size: int
    counted: bool
    """False for what a fused kernel would keep in registers."""
    reference: weakref.ref[Any] | None = None


class Meter(TorchDispatchMode):
    """Measures while it is entered; enter it inside of a :class:`FakeTensorMode`."""

    def __init__(self, group_names: dict[str, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        """The one mode of all tensors: those of another would be taken for new ones."""
        self.group_names = group_names or {}
        """What to call a process group, by its ``group_name``."""
        self.selected: int | None = None
        """How many elements the next masks select, where that is known."""
        self.now = 0
        """Bytes of memory that is alive."""
        self.peak = 0
        self.work = Work()
        self._alive: dict[int, _Storage] = {}
        self._fused: list[_Storage] | None = None
        """What the fused region under way has made."""

    def restart_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # comes again as what it does to this rank's part
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            self.work.host_reads += 1
            return _one(args[0].dtype)
        if name == "nonzero" and isinstance(args[0], FakeTensor):
            self.work.host_reads += 1
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        if name == "masked_select" and self.selected is not None:
            return self._select(*args)
        if func.namespace == "prim":  # asks where a tensor is
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if name not in _NO_KERNEL and self._fused is None:
            self._count(name, args, (out, kwargs.get("out")))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._follow(tensor)
        return out

    def _select(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """As many elements as are known to be selected, which the host waits for."""
        assert self.selected is not None
        chosen = tensor.new_empty(self.selected)
        self.work.host_reads += 1
        self._count("masked_select", (tensor, mask), (chosen,))
        self._follow(chosen)
        return chosen

    def _follow(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        entry = _Storage(storage.nbytes(), counted=self._fused is None)

        def freed(_: object) -> None:
            if self._alive.pop(key).counted:
                self.now -= entry.size

        entry.reference = weakref.ref(storage, freed)
        self._alive[key] = entry
        if self._fused is None:
            self._grow(entry.size)
        else:
            self._fused.append(entry)

    def resized(self, tensor: Tensor) -> None:
        """Take note that a tensor's memory was freed under it, or given back to it."""
        storage = tensor.untyped_storage()
        entry = self._alive.get(id(storage))
        if entry is not None and entry.counted:
            change, entry.size = storage.nbytes() - entry.size, storage.nbytes()
            self._grow(change)

    def _grow(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextmanager
    def fused(self, name: str, inputs: Any) -> Iterator[None]:
        """A region that a compiler makes one kernel of: what it makes on the way needs no memory."""
        if self._fused is not None:
            yield
            return
        self._fused = []
        yield
        made, self._fused = self._fused, None
        self.work.kernels[name] += 1
        self.work.moved[name] += _nbytes(inputs)
        for entry in made:
            if entry.reference is not None and entry.reference() is not None:
                entry.counted = True
                self._grow(entry.size)
                self.work.moved[name] += entry.size

    def _count(self, name: str, args: tuple[Any, ...], out: Any) -> None:
        product = _product(name, args)
        self.work.kernels[name] += _KERNELS_EACH.get(name, 1)
        if product is not None:
            self.work.products[product] += 1
        elif name == "all_gather_copy_in":
            self.work.moved[name] += 2 * _nbytes(args[0])  # into this rank's place in the memory that is gathered
        elif name not in _ATTENTION:
            self.work.moved[name] += _nbytes((args, out)) + _written_in_place(name, args)

    def _communicate(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "coalesced" in name:
            return self._communicate_apart(name, args)
        group = _group(args)
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
        if kind is not None and group.size() > 1:
            whole = max(_nbytes(arg) for arg in args[:2])
            self.work.send(kind, self.group_names.get(group.group_name, "other"), whole, group.size())
        return func(*args, **kwargs)

    def _communicate_apart(self, name: str, args: tuple[Any, ...]) -> Any:
        """Collectives over a list of tensors have no fake form; one after the other they do the same."""
        single = getattr(torch.ops.c10d, _SINGLE[name]).default
        rest: list[Any] = [arg for arg in args if isinstance(arg, torch.ScriptObject)]  # the group, and how to reduce
        if name == "allreduce_coalesced_":
            tensors: Any = [([tensor],) for tensor in args[0]]
            rest.append(None)  # indices of a sparse tensor
        else:
            tensors = zip(*args[:2], strict=True)
        results = [self._communicate(single, _SINGLE[name], (*parts, *rest), {}) for parts in tensors]
        return results[-1][-1]


_SINGLE = {
    "allreduce_coalesced_": "allreduce_",
    "allgather_into_tensor_coalesced_": "_allgather_base_",
    "reduce_scatter_tensor_coalesced_": "_reduce_scatter_base_",
}


def _group(args: tuple[Any, ...]) -> dist.ProcessGroup:
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    group: dist.ProcessGroup = dist.ProcessGroup.unbox(boxed)
    return group


def _one(dtype: torch.dtype) -> float | int | bool:
    """What the host is told of a value that does not exist: finite, positive, true."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _written_in_place(name: str, args: tuple[Any, ...]) -> int:
    """Bytes written by an operator over lists of tensors, which returns none of them."""
    if name == "_fused_adamw_":  # parameters and both moments, but not the gradients
        return _nbytes((args[0], args[2], args[3]))
    return _nbytes(args[0]) if name.startswith("_foreach_") and name.endswith("_") else 0


def _product(name: str, args: tuple[Any, ...]) -> Product | None:
    """The matrix product that an operator computes, if it is one."""
    if name in ("mm", "addmm", "addmm_"):
        left, right = args[:2] if name == "mm" else args[1:3]
        return Product(left.shape[0], right.shape[1], left.shape[1])
    if name in ("bmm", "baddbmm"):
        left, right = args[:2] if name == "bmm" else args[1:3]
        return Product(left.shape[1], right.shape[2], left.shape[2], left.shape[0])
    return None

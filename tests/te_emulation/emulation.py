"""Transformer Engine's own Python in a process without a GPU."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch


def install(folder: Path) -> None:
    """Import Transformer Engine from ``folder`` on the stand-in of its compiled module; for the whole process.

    It has to come before megatron-core is imported, which looks for Transformer Engine then and never again.
    """
    assert "megatron.core" not in sys.modules, "megatron-core has decided already"
    _answer_as_a_gpu()
    sys.path.append(str(folder))
    from tests.te_emulation import extension

    sys.modules["transformer_engine_torch"] = extension
    with warnings.catch_warnings(), _without_cuda_libraries(), _triton():
        warnings.simplefilter("ignore")
        # Its own search for the compiled module, which fails, is left out of the second import.
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        importlib.import_module("transformer_engine.pytorch")
    # It imports all names at once, which the stand-in makes when they are asked for.
    importlib.import_module("transformer_engine.pytorch.cpp_extensions").__getattr__ = extension.__getattr__  # type: ignore[method-assign]
    _say_that_there_is_cuda()
    _keep_on_the_cpu()


@contextmanager
def _without_cuda_libraries() -> Iterator[None]:
    """What Transformer Engine's own build sets, to import it before there is a library."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    try:
        yield
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]


class _Kernels(types.ModuleType):
    """A module of Triton: decorators that leave kernels uncompiled, and names for annotations."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "3.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything:
    """Accepts every use that defining a kernel makes of Triton's names."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) and not named else _Anything()


class _TritonFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Kernels(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def _triton() -> Iterator[None]:
    """Let `import triton` succeed for a block. Its kernels (of experts and of FP8) are never called here."""
    if importlib.util.find_spec("triton") is not None:  # comes with builds of torch for GPUs
        yield
        return
    from torch.utils import _triton

    _triton.has_triton_package()  # torch keeps its answer: there is none
    finder = _TritonFinder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Kernels)]:
            del sys.modules[name]


def _answer_as_a_gpu() -> None:
    """An H100 for Transformer Engine, which asks torch while it is imported and when it chooses kernels."""
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *device: (9, 0)
    cuda.get_device_properties = lambda *device: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="H100 of the emulation", total_memory=80 * 2**30
    )
    cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = "12.9"  # from which on there are products in blocks of FP8


def _say_that_there_is_cuda() -> None:
    """Where it refuses to work without."""
    from transformer_engine.pytorch import utils
    from transformer_engine.pytorch.module import base

    begin = base.TransformerEngineBaseModule.__init__

    def begin_with_cuda(module: Any, *arguments: Any, **named: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            begin(module, *arguments, **named)

    base.TransformerEngineBaseModule.__init__ = begin_with_cuda
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        utils._empty_tensor()  # makes the one that it gives from then on
    base._dummy_wgrads = _DummyGradients()


def _keep_on_the_cpu() -> None:
    """What names a GPU outside of forward, where nothing turns its name into the CPU's."""
    from transformer_engine.pytorch import distributed, quantized_tensor
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor

    def without_device(make: Any) -> Any:
        def make_empty(quantizer: Any, shape: Any, *, device: object = None, **named: Any) -> Any:
            return make(quantizer, shape, device=torch.device("cpu"), **named)

        return make_empty

    for module in (quantized_tensor, float8_tensor, float8_blockwise_tensor):
        for name, kind in vars(module).items():
            if name.endswith("Quantizer") and kind.__module__ == module.__name__ and "make_empty" in vars(kind):
                kind.make_empty = without_device(kind.make_empty)
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    group: Any = torch.distributed
    manager = group._coalescing_manager

    def coalescing_manager(*arguments: Any, **named: Any) -> Any:
        asking = sys._getframe(1).f_globals["__name__"]
        ours = asking.startswith("transformer_engine.")
        return _one_after_the_other() if ours else manager(*arguments, **named)

    group._coalescing_manager = coalescing_manager


@contextmanager
def _one_after_the_other() -> Iterator[Any]:
    """Collectives that NCCL would run as one, which gloo cannot: they are done when they return."""
    yield types.SimpleNamespace(wait=lambda: None)


def _is_cuda(tensor: torch.Tensor) -> bool:
    """Yes to Transformer Engine; the truth to everybody else."""
    asking = sys._getframe(1).f_globals["__name__"]
    return asking.startswith("transformer_engine.") or torch._C.TensorBase.is_cuda.__get__(tensor)  # type: ignore[no-any-return, attr-defined]


class _DummyGradients(dict[tuple[int, int, torch.dtype], torch.Tensor]):
    """The gradients that stand for those which were added in place already.

    Transformer Engine leaves them uninitialised. Here they are not a number, so that whoever adds them is seen.
    """

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: tuple[int, int, torch.dtype]) -> torch.Tensor:
        self[key] = torch.full(key[:2], torch.nan, dtype=key[2])
        return self[key]

"""Puts the CPU in the GPU's place, for the whole process."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.te_emulation.host import find_python

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # there is no GPU to compile for
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
_LASTING = contextlib.ExitStack()
"""Never closed."""
_DRIVERS: list[Any] = []
"""That of this process, once it is installed."""
DEVICES = 2
"""Of the machine; a process alone uses the first."""


def rehearsed() -> bool:
    """Whether this process rehearses."""
    return bool(_DRIVERS)


def install(devices: int = DEVICES) -> Any:
    """Let torch find GPUs, the project choose their kernels, and the CPU compute what they would.

    Call it before megatron-core is imported. Transformer Engine is its own Python on the emulation of its compiled
    module, where that is installed (`make te-python`).

    Args:
        devices: GPUs of the machine.

    Returns:
        The :class:`~tests.rehearsal.driver.Driver`, which knows the calls.
    """
    if _DRIVERS:
        return _DRIVERS[0]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch
    import torch._dynamo  # looks for what a build for CUDA has

    from tests.flash_reference import flash_on_cpu
    from tests.rehearsal.driver import Driver
    from tests.rehearsal.tensors import OnCpu, is_cuda, wide_products

    torch.set_num_threads(1)
    driver = Driver(devices)
    _replace_calls(driver)
    _replace_objects(driver)
    _transformer_engine(driver)
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: driver.count() > 0 and is_cuda())
    tensor.record_stream = lambda self, stream: None
    _compiled(driver)
    _gloo_for_nccl()
    _enter_in_threads(driver)
    _LASTING.enter_context(flash_on_cpu())
    _LASTING.enter_context(wide_products())
    _LASTING.enter_context(OnCpu(driver))
    _DRIVERS.append(driver)
    return driver


def _replace_calls(driver: Any) -> None:
    """The names of a build for CUDA."""
    import torch

    for name, replacement in driver.replacements().items():
        setattr(torch._C, name, replacement)
    cuda: Any = torch.cuda
    cuda._exchange_device = cuda._maybe_exchange_device = driver.exchange_device
    cuda._get_device_properties = driver.properties
    cuda._device_count_nvml = lambda: -1  # ask the driver
    cuda._check_cubins = cuda._check_capability = lambda: None
    cuda._queued_calls.clear()
    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda device: (driver.properties(device).total_memory, 80 * 2**30))
    cuda.default_generators = (torch.default_generator,) * driver.devices


def _replace_objects(driver: Any) -> None:
    """Streams, events and profiler ranges, whose base classes a build for CPUs lacks."""
    import torch

    class Stream:
        """A queue that is always empty."""

        def __init__(self, device: Any = None, priority: int = 0, **given: int) -> None:
            if not given:
                with torch.cuda.device(device):
                    number, index = driver.new_stream()
                given = {"stream_id": number, "device_index": index, "device_type": 1}
            self.stream_id, self.device_index = given["stream_id"], given["device_index"]
            self.device_type = given["device_type"]
            self.device = torch.device("cuda", self.device_index)

        def wait_stream(self, stream: Stream) -> None:
            assert isinstance(stream, Stream)

        def wait_event(self, event: Event) -> None:
            assert isinstance(event, Event)

        def record_event(self, event: Event | None = None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            """Nothing is left to do."""

    class Event:
        """A mark that is passed already."""

        def __init__(self, **options: bool) -> None:
            assert options.keys() <= {"enable_timing", "blocking", "interprocess", "external"}

        def record(self, stream: Stream | None = None) -> None:
            """At once."""

        def wait(self, stream: Stream | None = None) -> None:
            """Not at all."""

        def synchronize(self) -> None:
            """Nothing is left to do."""

        def query(self) -> bool:
            return True

    cuda: Any = torch.cuda
    cuda.Stream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.nvtx._nvtx = SimpleNamespace(rangePushA=driver.push_range, rangePop=driver.pop_range)


def _transformer_engine(driver: Any) -> None:
    """Its emulation, without the GPU that the emulation itself stands in for."""
    import torch

    folder = find_python()
    if folder is None:
        return
    from tests.te_emulation import emulation

    names = ("get_device_capability", "get_device_properties")
    real = {name: getattr(torch.cuda, name) for name in names}
    emulation.install(folder)
    for name, function in real.items():
        setattr(torch.cuda, name, function)
    extension = sys.modules["transformer_engine_torch"]
    for name in [name for name in vars(extension) if name.startswith("multi_tensor_")]:
        setattr(extension, name, one_kernel(getattr(extension, name), driver))


def one_kernel(function: Callable[..., Any], driver: Any) -> Callable[..., Any]:
    """A stand-in for one kernel, whose intermediate tensors are no memory of the GPU."""

    def run(*arguments: Any, **named: Any) -> Any:
        if driver.counter is None:
            return function(*arguments, **named)
        return driver.counter.one_kernel(function, *arguments, **named)

    return run


def _compiled(driver: Any) -> None:
    """What megatron-core gives to torch.compile, which makes one kernel of each."""
    from nemo_lmpo.trace.world import COMPILED

    for path, names in COMPILED.items():
        module = importlib.import_module(path)
        for name in names:
            setattr(module, name, one_kernel(getattr(module, name), driver))


def _gloo_for_nccl() -> None:
    """NCCL needs GPUs; its place in `init_process_group` is all that is seen of it."""
    import torch.distributed

    dist: Any = torch.distributed
    join = dist.init_process_group

    def join_on_gloo(backend: str, **options: Any) -> None:
        join("gloo" if backend == "nccl" else backend, **options)

    dist.init_process_group = join_on_gloo


def _enter_in_threads(driver: Any) -> None:
    """Torch's modes hold for a thread; every other one enters its own."""
    from tests.rehearsal.tensors import OnCpu

    thread: Any = threading.Thread
    begin = thread._bootstrap_inner

    def begin_on_cpu(self: threading.Thread) -> None:
        with OnCpu(driver):
            begin(self)

    thread._bootstrap_inner = begin_on_cpu

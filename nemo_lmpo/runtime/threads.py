"""How threads are started: each works on the GPU of the thread that started it.

CUDA gives a new thread GPU 0, whichever its process computes on. What such a thread did on "the current GPU" would make
a context there, half a GiB for each rank of a machine. No other module starts a thread by itself; a test holds that.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def current_gpu() -> int | None:
    """This thread's GPU; None where CUDA is not in use, without looking for it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    device: int = torch.cuda.current_device()
    return device


def use_gpu(device: int | None) -> None:
    """Let this thread work on a GPU; None: leave it."""
    if device is not None:
        import torch

        torch.cuda.set_device(device)


class Thread(threading.Thread):
    """A daemon that works on the GPU of its starter."""

    def __init__(self, target: Callable[..., object], *arguments: Any, name: str) -> None:
        super().__init__(target=target, args=arguments, name=name, daemon=True)
        self._gpu: int | None = None

    def start(self) -> None:
        """As the base class, from the thread whose GPU it takes."""
        self._gpu = current_gpu()
        super().start()

    def run(self) -> None:
        """The target, on that GPU."""
        use_gpu(self._gpu)
        super().run()


def thread_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """Threads that take turns, on the GPU of the thread that makes them."""
    return ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=use_gpu, initargs=(current_gpu(),))


def one_ahead(items: Iterator[T], name: str) -> Iterator[T]:
    """The items, each made in a thread while the one before it is used; an error comes where its item would.

    Two items exist at a time.
    """
    end = object()
    with thread_pool(1, name) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]  # which is not the end


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, workers: int, name: str
) -> Generator[_Result, None, None]:
    """What ``function`` makes of each item, in the items' order, while threads work on the next ones.

    Args:
        function: called in the threads. What it raises is raised where its result would come, and nothing new begins.
        items: taken as they are needed, by the thread that asks for results: at most one more than there are threads.
        workers: threads.
        name: of the threads, in tracebacks and debuggers.
    """
    pool = thread_pool(workers, name)
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def timer(seconds: float, function: Callable[..., object], *arguments: Any) -> threading.Timer:
    """A started daemon that calls ``function`` later, unless it is cancelled.

    It touches no GPU by itself: it is there for when GPUs no longer answer.
    """
    started = threading.Timer(seconds, function, arguments)
    started.daemon = True
    started.start()
    return started

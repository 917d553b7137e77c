"""Threads of the package start on the GPU of their starter, and nowhere by other means."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest
import torch

from nemo_lmpo.runtime import threads

PACKAGE = Path(threads.__file__).resolve().parent.parent
STARTERS = {"Thread", "Timer", "ThreadPoolExecutor", "ThreadPool", "start_new_thread", "to_thread", "run_in_executor"}
SERVERS = {"ThreadingMixIn", "ThreadingHTTPServer", "ThreadingTCPServer", "ThreadingUnixStreamServer"}


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def thread_starts(source: str) -> list[str]:
    """Line and name of everything that starts a thread without the helper."""
    tree = ast.parse(source)
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "nemo_lmpo.runtime.threads"
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in STARTERS:
            if not (isinstance(node.func, ast.Name) and node.func.id in ours):
                found.append(f"{node.lineno} {name_of(node.func)}")
        elif isinstance(node, ast.Call) and name_of(node.func) in SERVERS:
            found.append(f"{node.lineno} {name_of(node.func)}")
        elif isinstance(node, ast.ClassDef):
            bases = {name_of(base) for base in node.bases}
            methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            if bases & {*STARTERS} or (bases & SERVERS and "process_request" not in methods):
                found.append(f"{node.lineno} {node.name}")
    return found


def test_every_thread_is_started_by_the_helper() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if path != Path(threads.__file__).resolve()]
    found = {str(path.relative_to(PACKAGE)): starts for path in others if (starts := thread_starts(path.read_text()))}
    assert not found, "start it with nemo_lmpo.runtime.threads, which gives it its GPU"


@pytest.mark.parametrize(
    "source",
    [
        "import threading\nthreading.Thread(target=print).start()",
        "from threading import Thread\nThread(target=print).start()",
        "from concurrent.futures import ThreadPoolExecutor as pool, ThreadPoolExecutor\nThreadPoolExecutor(1)",
        "import threading\nclass Own(threading.Thread):\n    pass",
        "from http.server import ThreadingHTTPServer\nclass Own(ThreadingHTTPServer):\n    pass",
    ],
)
def test_other_ways_are_found(source: str) -> None:
    assert thread_starts(source)


def test_threads_take_over_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int | None] = []
    monkeypatch.setattr(threads, "current_gpu", lambda: 3)
    monkeypatch.setattr(threads, "use_gpu", chosen.append)
    thread = threads.Thread(lambda: chosen.append(-1), name="one")
    thread.start()
    thread.join()
    assert chosen == [3, -1]
    with threads.thread_pool(1, "pool") as pool:
        pool.submit(chosen.append, -2).result()
    assert chosen == [3, -1, 3, -2]


def test_no_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("it looks"))
    assert threads.current_gpu() is None
    threads.use_gpu(None)


def test_results_come_in_the_order_of_their_items() -> None:
    second_ended = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_ended.wait(30), "the second item does not run beside the first"
        if item == 1:
            second_ended.set()
        return 10 * item

    taken: list[int] = []
    items = (taken.append(item) or item for item in range(6))  # type: ignore[func-returns-value]
    results = threads.in_order(work, items, workers=2, name="test")
    assert next(results) == 0
    assert taken == [0, 1, 2], "no more is taken than threads can use"
    assert list(results) == [10, 20, 30, 40, 50]


def test_an_error_comes_in_its_items_place_and_nothing_new_begins() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item >= 1:
            raise ValueError(item)
        return item

    results = threads.in_order(work, range(100), workers=2, name="test")
    assert next(results) == 0
    with pytest.raises(ValueError, match=r"^1$"):
        list(results)
    assert set(begun) <= {0, 1, 2, 3}

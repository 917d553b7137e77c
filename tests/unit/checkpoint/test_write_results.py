"""What forked writers report reaches the run, whatever its size, and without a process that holds it."""

from __future__ import annotations

import os
import queue

import pytest

from nemo_lmpo.checkpoint.writers import WriteResults


def put_in_a_fork(results: WriteResults, *values: object) -> None:
    child = os.fork()
    if not child:
        for value in values:
            results.put(value)
        os._exit(0)  # as a writer that ends at once: nothing may be left unwritten
    assert os.waitpid(child, 0)[1] == 0


def test_values_come_in_order_and_leave_nothing_behind() -> None:
    results = WriteResults()
    large = {"layer": "w" * (1 << 22)}  # more than a pipe holds, which would block a writer that nobody reads
    for _ in range(2):
        put_in_a_fork(results, (0, large), "second")
        results.put("own")
        assert [results.get_nowait() for _ in range(3)] == [(0, large), "second", "own"]
        assert os.fstat(results._file.fileno()).st_size == 0


def test_nothing_is_a_queue_that_is_empty() -> None:
    results = WriteResults()
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.mark.parametrize("kept", [0.1, 0.9])
def test_a_writer_that_died_while_it_reported_has_reported_nothing(kept: float) -> None:
    results = WriteResults()
    put_in_a_fork(results, list(range(1000)))
    number = results._file.fileno()
    os.ftruncate(number, int(kept * os.fstat(number).st_size))
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_an_error_is_a_value() -> None:
    results = WriteResults()
    put_in_a_fork(results, OSError(28, "No space left on device"))
    error = results.get_nowait()
    assert isinstance(error, OSError)
    assert error.errno == 28

"""What forked writers report reaches the run, whatever its size, and without a process that holds it."""

from __future__ import annotations

import errno
import os
import queue
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_lmpo.checkpoint import writers
from nemo_lmpo.checkpoint.writers import SummedFile, WriteResults, Written
from nemo_lmpo.formats.torch_archive import save_into
from nemo_lmpo.runtime.files import file_checksum


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


def test_a_checksum_made_while_writing_is_that_of_the_file(tmp_path: Path) -> None:
    """Torch's archives write tensors as wholes and headers in small parts."""
    file = SummedFile(tmp_path / "file")
    tensors = [torch.arange(3), torch.randn(600, 1000), torch.zeros(0), torch.randn(7).bfloat16()]
    ends = []
    for tensor in tensors:
        save_into(file.write, tensor)
        ends.append(file.size)
    checksum = file.finish()
    assert checksum == file_checksum(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert len(content) == file.size
    plain = tmp_path / "plain"
    for begin, end, tensor in zip([0, *ends], ends, tensors, strict=False):
        with plain.open("wb") as stream:
            torch.save(tensor, stream)
        assert zlib.crc32(plain.read_bytes()) == zlib.crc32(content[begin:end]), "each entry is a file of torch's own"


def item(number: int) -> Any:
    return SimpleNamespace(index=number)


def test_files_are_written_together_and_reported_apart(tmp_path: Path) -> None:
    """In a fork, as saves in the background are."""
    found, engine = WriteResults(), WriteResults()
    names = ["__0_0.distcp", "__0_1.distcp"]
    items: list[Any] = [([], [(item(number), torch.full((9,), float(number)))]) for number in (0, 1)]
    buckets = [(str(tmp_path / name), name, of_file) for name, of_file in zip(names, items, strict=True)]
    child = os.fork()
    if not child:
        writers._Writers(found)(0, buckets, engine)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    places: Any
    written, places = found.get_nowait(), engine.get_nowait()
    assert isinstance(written, Written)
    assert written.checksums == {name: file_checksum(tmp_path / name) for name in names}
    assert written.num_bytes == sum((tmp_path / name).stat().st_size for name in names)
    assert [places[n][0].storage_data.relative_path for n in (0, 1)] == names
    assert [float(torch.load(tmp_path / name, weights_only=True)[0]) for name in names] == [0.0, 1.0]


def test_the_reason_of_a_failed_write_is_kept(tmp_path: Path) -> None:
    """Torch's archive would say that a position was unexpected, and megatron-core 0.19 nothing."""
    found, engine = WriteResults(), WriteResults()
    full: Any = ("/dev/full", "__0_1.distcp", ([], [(item(1), torch.zeros(10**5))]))
    fine: Any = (str(tmp_path / "fine"), "fine", ([], [(item(0), torch.zeros(3))]))
    writers._Writers(found)(0, [fine, full], engine)
    error = engine.get_nowait()
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    with pytest.raises(queue.Empty):
        found.get_nowait()

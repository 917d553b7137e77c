"""How a checkpoint's data files are written: megatron-core plans them, threads here write and sum them up as they go.

megatron-core's own writers compute no checksums, so that every file had to be read again; those of 0.16 fork a process
a file, and those of 0.19 write one file after the other and lose the reason of a failure.
"""

from __future__ import annotations

import inspect
import io
import os
import pickle
import queue
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash
from torch import Tensor

from nemo_lmpo.checkpoint.agreement import on_main_rank
from nemo_lmpo.formats.torch_archive import save_into
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.threads import thread_pool

WORTH_TWO_WRITERS = 2**28
"""Bytes of a rank's share; of less, one file is written before a second writer has begun."""
"""Bytes that are summed up and then written while the processor's cache still holds them."""


class WriteResults:
    """What a forked writer found, in memory that it shares with this process.

    megatron-core's own queue is a server process, which imports torch and megatron-core to hold such values (two
    seconds and 200 MiB per rank), and outlives a killed run.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._file: IO[bytes] = os.fdopen(os.memfd_create("write_results"), "w+b")
        else:  # not Linux: a file without a name
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as this
        self._taken = 0

    def put(self, value: object) -> None:
        """Leave a value, in this process or in a fork of it; one at a time."""
        with os.fdopen(os.dup(self._file.fileno()), "ab") as file:
            pickle.dump(value, file)

    def get_nowait(self) -> object:
        """The next value.

        Raises:
            queue.Empty: there is none, or its writer died in the middle of it.
        """
        # Writers move the file's position, which is shared, too.
        number = self._file.fileno()
        rest = io.BytesIO(os.pread(number, os.fstat(number).st_size - self._taken, self._taken))
        try:
            value: object = pickle.load(rest)  # noqa: S301 - of our own forks
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._taken += rest.tell()
        if not rest.read(1):  # one save's results need not lie there until the last
            os.ftruncate(number, 0)
            self._taken = 0
        return value


def collect_write_results() -> None:
    """Give megatron-core's writers of this process the place in which they report."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not isinstance(getattr(filesystem_async, "_results_queue", None), WriteResults):
        filesystem_async._results_queue = WriteResults()


@dataclass
class Written:
    """A rank's data files as they were written."""

    checksums: dict[str, str] = field(default_factory=dict)
    """XXH3 of 128 bits by file name."""
    num_bytes: int = 0
    seconds: float = 0.0
    """From the first byte until all files were on the disk."""


class SummedFile:
    """A file that is written from its beginning to its end, and whose checksum grows with it."""

    def __init__(self, path: Path) -> None:
        """Make or empty the file."""
        self._file = path.open("wb")
        self._digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, content: memoryview) -> None:
        """Append bytes; all of them."""
        self._digest.update(content)
        self.size += self._file.write(content)

    def finish(self) -> str:
        """Bring the file to the disk and close it; its checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is."""
        with suppress(OSError):  # its last bytes do not fit either
            self._file.close()


@dataclass
class Writing:
    """A save that is under way."""

    request: Any
    """megatron-core's, to be executed or given to a queue of calls."""
    results: WriteResults

    def written(self) -> Written:
        """What this rank wrote, once the request has been carried out."""
        try:
            found = self.results.get_nowait()
        except queue.Empty:
            return Written()  # a rank of which nothing was needed
        assert isinstance(found, Written)
        return found


def begin_writing(state: dict[str, Any], directory: Path, *, in_background: bool) -> Writing:
    """Plan the files of a sharded state dict, and write what is small; the request to write them is not carried out.

    Communicates over all ranks.

    Args:
        state: megatron-core's sharded state dict.
        directory: of the data files.
        in_background: the request is for a queue of calls, which copies tensors to the host and forks. Otherwise
            tensors come to the host one by one.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    collect_write_results()
    save = dist_checkpointing.save
    # Newer versions would take the writers of nvidia-resiliency-ext, which pip does not bring along.
    own_writers = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_writers(state))
    request = save(state, str(directory), sharded_strategy=strategy, async_sharded_save=True, **own_writers)
    on_main_rank(lambda: _write_common(state, directory / run_files.COMMON))
    results = WriteResults()
    if request.async_fn is not None:
        request = request._replace(async_fn=_Writers(results), preload_fn=request.preload_fn if in_background else None)
    return Writing(request, results)


def write_state(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state dict. Communicates over all ranks."""
    begin_writing(state, directory, in_background=False).request.execute_sync()


@dataclass
class _Writers:
    """Stands in the place of megatron-core's function that writes a rank's files."""

    results: WriteResults

    def __call__(self, rank: int, buckets: Sequence[Any], engine: WriteResults) -> None:
        """Write all files at the same time.

        Args:
            rank: this one's.
            buckets: per file its path, its name and its items: objects' bytes, and tensors.
            engine: where megatron-core looks for the place of every item, or for an error.
        """
        started = time.monotonic()
        with thread_pool(len(buckets), "writer") as pool:
            files = [pool.submit(_write_file, Path(path), name, *items) for path, name, items in buckets]
        try:
            found = [file.result() for file in files]
        except (OSError, RuntimeError, MemoryError) as error:
            engine.put(error)
            return
        checksums = {name: checksum for (_, name, _), (_, checksum, _) in zip(buckets, found, strict=True)}
        self.results.put(Written(checksums, sum(size for *_, size in found), time.monotonic() - started))
        engine.put({number: places for number, (places, _, _) in enumerate(found)})


def _write_file(
    path: Path, name: str, objects: Sequence[Any], tensors: Sequence[tuple[Any, Tensor]]
) -> tuple[list[Any], str, int]:
    """Write one file as torch's distributed checkpoints are: the places of its items, its checksum and its size."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    file = SummedFile(path)
    places = []
    try:
        for item, content in [*objects, *tensors]:
            begin = file.size
            if isinstance(content, Tensor):
                save_into(file.write, _on_host(content))
            else:
                file.write(content.getvalue())  # no copy, and no view that a traceback keeps
            length = file.size - begin
            places.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
        return places, file.finish(), file.size
    finally:
        file.abandon()


def _on_host(tensor: Tensor) -> Tensor:
    """A tensor in the host's memory; from a GPU through a pinned block, which torch keeps for the next one."""
    if tensor.device.type == "cpu":
        return tensor
    import torch

    copy = tensor.to("cpu", non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return copy


def _writers(state: dict[str, Any]) -> int:
    """Files that this rank writes its share to, all at the same time."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    tensors = (getattr(value, "data", None) for value in nested_values(state))
    return 1 if sum(getattr(tensor, "nbytes", 0) for tensor in tensors) < WORTH_TWO_WRITERS else 2


def _write_common(state: dict[str, Any], file: Path) -> None:
    """Write what belongs to no rank, plain values beside the sharded ones, where megatron-core did not.

    From 0.19 on it puts them among the tensors only. In a file of their own as well, every version reads them, and a
    checkpoint's step can be compared without megatron-core.
    """
    if file.exists():
        return
    import torch
    from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base

    _, persistent = extract_nonpersistent(state)
    _, common = extract_sharded_base(persistent)
    torch.save(common, file)

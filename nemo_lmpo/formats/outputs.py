"""New files and directories that appear complete or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.runtime.files import format_bytes

_OURS = ("config.json", "model_config.yaml")
"""A directory with one of these is a model that may be replaced."""
_PARTIAL, _OLD = ".partial", ".old"
_SLACK = 200
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Linux's numbers of `renameat2`."""


def check_output(output: Path, inputs: list[Path], *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        CheckpointError: it exists (and ``overwrite`` is off, or it does not look like a model), it is one of
            the ``inputs``, or its parent is missing or not writable.
    """
    recover(output)
    resolved = output.resolve()
    for path in inputs:
        given = path.resolve()
        if resolved == given or resolved in given.parents or given in resolved.parents:
            raise CheckpointError(f"the output {output} and the input {path} overlap; choose another output")
    if output.exists() or output.is_symlink():
        if not overwrite:
            raise CheckpointError(f"{output} exists; give another output or --overwrite")
        if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in _OURS):
            raise CheckpointError(f"{output} is a directory without a model and is not overwritten; remove it yourself")
    parent = resolved.parent
    if not parent.is_dir():
        raise CheckpointError(f"the directory {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"the directory {parent} is not writable; choose another output")


def check_disk(output: Path, needed: int) -> None:
    """Compare the bytes ``needed`` with what is free where ``output`` will be.

    Raises:
        CheckpointError: too little.
    """
    parent = output.resolve().parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{output} needs {format_bytes(needed)}, but {parent} has {format_bytes(free)} free; "
            "free some space or choose another disk"
        )


@contextmanager
def complete_or_not_at_all(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``output`` to write to; it takes the output's place when the context succeeds.

    On an error or interruption it is removed. A process that is killed leaves it behind under a name that starts with
    a dot and ends in `.partial`, and the output as it was; the next one to the same output removes it.

    Raises:
        CheckpointError: without ``overwrite``, an output that has appeared meanwhile, which stays as it is.
    """
    recover(output)
    temporary = _sibling(output, _PARTIAL)
    _remove(temporary)
    try:
        yield temporary
        _take_place(temporary, output, overwrite)
    except BaseException:
        _remove(temporary)
        raise


def _sibling(output: Path, suffix: str) -> Path:
    """A name of this process alone: numbers of processes are used again, by the next container too."""
    return output.parent / f".{output.name}.{platform.node()}.{os.getpid()}-{_start_of(os.getpid())}{suffix}"


def _start_of(process: int) -> int | None:
    """When a process of this machine started, in hundredths of a second; None: there is none."""
    try:
        return round(psutil.Process(process).create_time() * 100)
    except psutil.NoSuchProcess:
        return None


def recover(output: Path) -> None:
    """Undo what killed processes of this machine left beside ``output``; another machine's may still be at work.

    A replaced output that was stepping aside takes its place again if nothing else has; the rest is removed.
    """
    for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else ():
        if (suffix := _left_by_a_dead_process(path.name, output.name)) is None:
            continue
        if suffix == _OLD and not (output.exists() or output.is_symlink()):
            path.rename(output)
        else:
            _remove(path)


def _left_by_a_dead_process(name: str, output: str) -> str | None:
    """The suffix of a temporary name beside ``output``, if its process is not at work any more."""
    host = re.escape(platform.node())
    # Earlier versions named no start, and no host of what stepped aside.
    found = re.fullmatch(rf"\.{re.escape(output)}(?:\.{host})?\.(\d+)(?:-(\d+))?(\.partial|\.old)", name)
    if found is None:
        return None
    process = int(found[1])
    started = _start_of(process)
    if started is None:
        return found[3]
    # Clocks are set, so starts are compared with some slack.
    other = abs(int(found[2]) - started) > _SLACK if found[2] else process == os.getpid()
    return found[3] if other else None


def _take_place(temporary: Path, output: Path, overwrite: bool) -> None:
    there = output.exists() or output.is_symlink()
    if not overwrite or not there:
        _appear(temporary, output)
    elif not (output.is_dir() or temporary.is_dir()):
        temporary.replace(output)
    elif _exchange(temporary, output):
        _remove(temporary)
    else:
        # A directory cannot be renamed over another one: the old one steps aside first.
        old = _sibling(output, _OLD)
        output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            old.rename(output)
            raise
        _remove(old)
    make_durable(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the storage cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def make_durable(directory: Path) -> None:
    """Entries of a directory outlive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _appear(temporary: Path, output: Path) -> None:
    """Rename to a name that nobody has, even if another process is about to take it."""
    try:
        if temporary.is_dir():
            # A directory is renamed over nothing, or over an empty directory.
            temporary.rename(output)
        else:
            os.link(temporary, output)
            temporary.unlink()
    except OSError as error:
        if output.exists():
            raise CheckpointError(
                f"{output} was made by another process meanwhile and stays as it is; give another output or --overwrite"
            ) from None
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        # A file system without hard links has no such rename; the last look was just now.
        temporary.rename(output)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()

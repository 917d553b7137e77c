"""New files and directories that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from nemo_lmpo.errors import CheckpointError

_OURS = ("config.json", "model_config.yaml")
"""A directory with one of these is a model that may be replaced."""


def check_output(output: Path, inputs: list[Path], *, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        CheckpointError: it exists (and ``overwrite`` is off, or it does not look like a model), it is one of
            the ``inputs``, or its parent is missing or not writable.
    """
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


def format_bytes(count: int) -> str:
    """For example `13.5 GB` (decimal units)."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


@contextmanager
def complete_or_not_at_all(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``output`` to write to; it takes the output's place when the context succeeds.

    On an error or interruption it is removed. A process that is killed leaves it behind under a name that
    starts with a dot and ends in `.partial`, and no output; the next one to the same output removes it.

    Raises:
        CheckpointError: without ``overwrite``, an output that has appeared meanwhile, which stays as it is.
    """
    _remove_leftovers(output)
    temporary = output.parent / f".{output.name}.{platform.node()}.{os.getpid()}.partial"
    try:
        yield temporary
        _take_place(temporary, output, overwrite)
    except BaseException:
        _remove(temporary)
        raise


def _remove_leftovers(output: Path) -> None:
    """Remove what killed processes of this machine left; another machine's may still be at work."""
    start = f".{output.name}.{platform.node()}."
    for path in output.parent.iterdir():
        number = path.name.removeprefix(start).removesuffix(".partial")
        if path.name == f"{start}{number}.partial" and number.isdecimal() and not psutil.pid_exists(int(number)):
            _remove(path)


def _take_place(temporary: Path, output: Path, overwrite: bool) -> None:
    if overwrite and (output.is_dir() or (output.exists() and temporary.is_dir())):
        # A directory cannot be renamed over another one: the old one steps aside first.
        old = output.parent / f".{output.name}.{os.getpid()}.old"
        output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            old.rename(output)
            raise
        _remove(old)
    elif overwrite:
        temporary.replace(output)
    else:
        _appear(temporary, output)
    make_durable(output.parent)


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

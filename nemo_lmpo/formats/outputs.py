"""New files and directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
def replaced_when_complete(output: Path) -> Iterator[Path]:
    """A temporary sibling of ``output`` to write to; it takes the output's place when the context succeeds.

    On an error or interruption it is removed. A process that is killed leaves it behind under a name that
    starts with a dot and ends in `.partial`, and no output.
    """
    temporary = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        yield temporary
        _take_place(temporary, output)
    except BaseException:
        _remove(temporary)
        raise


def _take_place(temporary: Path, output: Path) -> None:
    if not output.is_dir() and not temporary.is_dir():
        temporary.replace(output)
    else:
        # A directory cannot be renamed over another one: the old one steps aside first.
        old = output.parent / f".{output.name}.{os.getpid()}.old"
        if output.exists() or output.is_symlink():
            output.rename(old)
        try:
            temporary.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        _remove(old)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()

"""The manifest of a checkpoint: every file's size and checksum, and what a damaged checkpoint is recognized by.

`manifest.json` holds ``version``, ``algorithm``, ``files`` (bytes by name), ``checksums`` (hexadecimal by name) and
``checksum``, which is that of the manifest itself without this entry. Checkpoints of version 1 have ``files`` only;
their data files are checked by the checksums that torch puts into each tensor's entry.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import stat
from collections.abc import Container, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import xxhash

from nemo_lmpo.checkpoint.progress import FORMAT_VERSION, DamageError, Progress, check_version, read_train_state
from nemo_lmpo.errors import CheckpointError, first_line, printable, shown
from nemo_lmpo.formats.archive import read_piece
from nemo_lmpo.formats.distributed_reader import (
    METADATA_FILE,
    as_saved,
    state_metadata,
    stored_pieces,
)
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import CHECKSUM, file_checksum, read_small, replace_file

STEP_KEY = "train_step"
"""Under this name the state's own `common.pt` tells its step, so that a state of another step is noticed."""

METADATA = f"{run_files.STATE}/{METADATA_FILE}"
COMMON = f"{run_files.STATE}/{run_files.COMMON}"
_REQUIRED = (run_files.PROGRESS, METADATA, COMMON)
_MOST_MANIFEST_BYTES = 2**26
# The machine's fault, not the file's: nothing is wrong with the checkpoint.
_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def files_of(directory: Path) -> list[str]:
    """Names of all files of a checkpoint but the manifest, in order."""
    found = (str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name != run_files.MANIFEST)


def write_manifest(directory: Path, checksums: Mapping[str, str] | None = None) -> None:
    """List every file; the last file of a checkpoint.

    Args:
        directory: the checkpoint.
        checksums: those that are known already, by name; the others are computed here.
    """
    known = checksums or {}
    names = files_of(directory)
    content: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "algorithm": CHECKSUM,
        "files": {name: (directory / name).stat().st_size for name in names},
        "checksums": {name: known.get(name) or file_checksum(directory / name) for name in names},
    }
    content["checksum"] = _own_checksum(content)
    replace_file(directory / run_files.MANIFEST, json.dumps(content, indent=1))


def _own_checksum(content: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def inspect(directory: Path, step: int, *, content: bool = True, share: tuple[int, int] = (0, 1)) -> Progress:
    """Look at a checkpoint's files, loading no tensor; its progress.

    Args:
        directory: the checkpoint.
        step: the step that its name tells.
        content: whether checksums are compared, besides sizes.
        share: this process's number and how many share the work: each reads its part of the data files.

    Raises:
        DamageError: a file is missing, cannot be read, or is not what was written.
        CheckpointError: a newer version of the package wrote it.
        OSError: the machine has no file handle or memory left.
    """
    try:
        return _inspect(directory, step, content, share)
    except FileNotFoundError as error:
        raise DamageError(f"{_relative(error.filename, directory)} is missing") from None
    except OSError as error:
        if error.errno in _NOT_THE_FILE:
            raise
        name = _relative(error.filename, directory) if error.filename else "a file"
        raise DamageError(f"{name} cannot be read ({error.strerror or error})") from None


def find_damage(directory: Path, *, content: bool = True) -> str | None:
    """What is wrong with a checkpoint directory, or None."""
    step = run_files.step_of(directory.name)
    assert step is not None, directory
    try:
        inspect(directory, step, content=content)
    except (DamageError, CheckpointError) as error:
        return str(error)
    return None


def _relative(name: Any, directory: Path) -> str:
    path = Path(str(name))
    inside = path.is_relative_to(directory) and path != directory
    return printable(str(path.relative_to(directory)) if inside else path.name, 200)


def _inspect(directory: Path, step: int, content: bool, share: tuple[int, int]) -> Progress:
    manifest = _read_manifest(directory)
    _check_sizes(directory, manifest["files"])
    if content and "checksums" in manifest:
        _check_checksums(directory, _part_of(sorted(manifest["checksums"].items()), share))
    state = read_train_state(directory, step)
    if state.version != manifest["version"]:
        raise DamageError(
            f"{run_files.MANIFEST} is of version {manifest['version']}, {run_files.PROGRESS} of version {state.version}"
        )
    entries = _data_entries(directory, manifest["files"])
    if content and "checksums" not in manifest:
        _check_entries(directory, _part_of(entries, share))
    if state.version > 1 and _step_of_state(directory) != step:
        raise DamageError(f"{run_files.STATE}/ is of another step")
    return state


def _part_of(items: Sequence[Any], share: tuple[int, int]) -> Sequence[Any]:
    return items[share[0] :: share[1]]


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small(directory / run_files.MANIFEST, most=_MOST_MANIFEST_BYTES))
    except (ValueError, RecursionError):
        raise DamageError(f"{run_files.MANIFEST} is not readable") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part, {}), dict) for part in ("files", "checksums")
    ):
        raise DamageError(f"{run_files.MANIFEST} is not readable")
    if "files" not in content:
        raise DamageError(f"{run_files.MANIFEST} lists no files")
    if content.keys() == {"files"}:
        content["version"] = 1
    elif content.get("checksum") != _own_checksum(content):
        raise DamageError(f"{run_files.MANIFEST} has another checksum than when it was written")
    check_version(content.get("version"), directory)
    for name in content["files"]:
        _refuse_other_places(name)
    missing = [name for name in _REQUIRED if name not in content["files"]]
    if missing:
        raise DamageError(f"{run_files.MANIFEST} does not list {missing[0]}")
    if content["version"] > 1 and (
        content.get("algorithm") != CHECKSUM or content["files"].keys() != content.get("checksums", {}).keys()
    ):
        raise DamageError(f"{run_files.MANIFEST} does not hold a checksum of every file")
    return content


def _refuse_other_places(name: str) -> None:
    """Refuse names of files that do not lie in the checkpoint, and that no system has.

    Raises:
        DamageError: such a name.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search("[\0\ud800-\udfff]", name):
        raise DamageError(f"{run_files.MANIFEST} names {shown(name)}, which is not a file of a checkpoint")


def _check_sizes(directory: Path, sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        found = (directory / name).stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device could be read for ever
            raise DamageError(f"{printable(name, 200)} is not a regular file")
        if found.st_size != size:
            raise DamageError(f"{printable(name, 200)} has {found.st_size} bytes instead of {shown(size)}")


def _check_checksums(directory: Path, checksums: Sequence[tuple[str, str]]) -> None:
    for name, checksum in checksums:
        if file_checksum(directory / name) != checksum:
            raise DamageError(f"{printable(name, 200)} has another checksum than when it was written")


def _data_entries(directory: Path, files: Container[str]) -> list[tuple[str, int, int]]:
    """File, offset and length of every tensor and object, by the state's metadata, which is read safely."""
    try:
        entries = stored_pieces(state_metadata(directory / run_files.STATE, METADATA))
    except (CheckpointError, AttributeError, TypeError, ValueError) as error:
        raise DamageError(first_line(error)) from None
    for name, _, _ in entries:
        if f"{run_files.STATE}/{name}" not in files:
            raise DamageError(f"{METADATA} names {shown(name)}, which {run_files.MANIFEST} does not list")
    return entries


def _check_entries(directory: Path, entries: Sequence[tuple[str, int, int]]) -> None:
    for name, offset, length in entries:
        with (directory / run_files.STATE / name).open("rb") as file:
            block = read_piece(file, offset, length)
        if len(block) != length or not as_saved(block):
            raise DamageError(f"{run_files.STATE}/{name} is damaged at byte {offset}")


def _step_of_state(directory: Path) -> Any:
    try:
        common = torch.load(directory / COMMON, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise DamageError(f"{COMMON} is not readable") from None
    return common.get(STEP_KEY) if isinstance(common, dict) else None

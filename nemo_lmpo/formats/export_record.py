"""What a Hugging Face directory held when it was written here: later stages see whether it still does.

`nemo_lmpo.json` holds ``version``, ``algorithm``, ``files`` (bytes by name) and ``checksums`` (hexadecimal by name) of
the weights and of every file that decides token ids, templates or logits. Directories without it are taken as they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_lmpo.errors import CheckpointError, printable
from nemo_lmpo.formats.peft_files import PEFT_CONFIG
from nemo_lmpo.formats.sidecars import sidecar_names
from nemo_lmpo.runtime.files import CHECKSUM, checksum, file_checksum, read_small, replace_file

RECORD = "nemo_lmpo.json"
_VERSION = 1
_WEIGHTS = "*.safetensors"
_TEXTS = ("LICENSE", "NOTICE", "USE_POLICY")
EDITABLE = ("generation_config.json", PEFT_CONFIG)
"""Settings of generation, and where an adapter's base lies: users set these, so a change is told and no error."""

_logger = logging.getLogger(__name__)


def write_record(
    directory: Path,
    coming: Mapping[str, bytes] = MappingProxyType({}),
    *,
    written: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """List what ``directory`` holds; the last file of an export.

    Args:
        directory: the export.
        coming: content by name of files that are written after this: until they are there, the export is refused.
        written: checksums by name that were made while the files were written; others are read again.
    """
    present = _small_files(directory) + _weight_files(directory)
    names = list(dict.fromkeys([*present, *(name for name in coming if not name.startswith(_TEXTS))]))
    content = {
        "version": _VERSION,
        "algorithm": CHECKSUM,
        "files": {name: len(coming[name]) if name in coming else (directory / name).stat().st_size for name in names},
        "checksums": {
            name: checksum(coming[name]) if name in coming else written.get(name) or file_checksum(directory / name)
            for name in names
        },
    }
    replace_file(directory / RECORD, json.dumps(content, indent=1) + "\n")


def foreign_files(directory: Path, own: Container[str]) -> tuple[list[str], list[str]]:
    """Small files beside those that an export has, by name: written by an earlier version, and added by somebody.

    Without a record that can be read, nobody knows who wrote them: both lists are empty.
    """
    try:
        record = _read(directory)
    except CheckpointError:
        record = None
    if record is None:
        return [], []
    others = [name for name in sidecar_names(directory) if name not in own and not name.startswith(_TEXTS)]
    return [name for name in others if name in record[0]], [name for name in others if name not in record[0]]


def check_record(directory: Path) -> None:
    """Compare names, all sizes, and the content of the small files with the record, if there is one.

    Raises:
        CheckpointError: a file that decides tokens or logits is another one, is gone, or has come.
    """
    record = _read(directory)
    if record is None:
        return
    sizes, checksums = record
    present = _small_files(directory) + _weight_files(directory)
    for name in [*sizes, *(name for name in present if name not in sizes)]:
        change = _change(
            directory / name, sizes.get(name), checksums.get(name), content=not name.endswith(_WEIGHTS[1:])
        )
        if change is None:
            continue
        if name in EDITABLE:
            _logger.warning("%s: %s is not what was written there: it %s; it is used as it is", directory, name, change)
        else:
            raise CheckpointError(_refusal(directory, name, change))


def changed_weights(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why weight files are not those of the record, or None; reads them all.

    Args:
        directory: a model; without a record, and for other forms, there is nothing to compare.
        share: this process's number and how many share the work.
    """
    record = _read(directory)
    for name in sorted(record[0])[share[0] :: share[1]] if record is not None else ():
        if record is not None and name.endswith(_WEIGHTS[1:]):
            change = _change(directory / name, record[0][name], record[1].get(name), content=True)
            if change is not None:
                return _refusal(directory, name, change)
    return None


def check_weights(directory: Path) -> None:
    """Compare the content of the weight files with the record, if there is one; reads them all.

    Raises:
        CheckpointError: one is another file than was written.
    """
    if (reason := changed_weights(directory)) is not None:
        raise CheckpointError(reason)


def _change(path: Path, size: Any, checksum: Any, *, content: bool) -> str | None:
    if size is None:
        return "was added"
    if not path.is_file():
        return "is gone"
    if (found := path.stat().st_size) != size:
        return f"has {found} bytes instead of {size}"
    return "has other content" if content and file_checksum(path) != checksum else None


def _refusal(directory: Path, name: str, change: str) -> str:
    return (
        f"{directory}: {printable(name, 200)} is not what was written there: it {change}; restore the directory, or, "
        f"if you changed it on purpose, remove {directory / RECORD}, and it is taken as it is"
    )


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(read_small(path))
        found = content["version"], content["algorithm"], dict(content["files"]), dict(content["checksums"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is not readable; restore the directory, or remove this file, and the rest is taken as it is"
        ) from None
    if found[:2] != (_VERSION, CHECKSUM):
        raise CheckpointError(f"{path} is of another version of this package; install that, or remove this file")
    return found[2], found[3]


def _small_files(directory: Path) -> list[str]:
    names = [name for name in sidecar_names(directory) if not name.startswith(_TEXTS)]
    others = ("model.safetensors.index.json", PEFT_CONFIG)
    return sorted([*names, *(name for name in others if (directory / name).is_file())])


def _weight_files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(_WEIGHTS))

"""Small duties of files: written whole or not at all, read with errors that name them, hashed, locked."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.runtime import run_files

# A run that was killed holds its lock until its helpers are gone, too.
_PATIENCE_SECONDS = 5.0
_BLOCK = 8 * 2**20

GIB = 2**30
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of storage that has no locks."""

_HUB_NAME = re.compile(r"[^\W_][\w.-]*/[\w.-]+")
_HUB_NAME_OR_OLD = re.compile(r"[^\W_][\w.-]*(/[\w.-]+)?")
_logger = logging.getLogger(__name__)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``; readers and crashes see either the old or the new file.

    Several processes may write the same path at once: the last one wins.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path, suffix: str) -> Path:
    """Rename ``path`` to itself with a suffix and, where that is taken, a number; the new path.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    target = path.with_name(path.name + suffix)
    while target.exists() or target.is_symlink():
        number += 1
        target = path.with_name(f"{path.name}{suffix}.{number}")
    path.rename(target)
    return target


def read_small(path: Path, most: int = 2**20) -> bytes:
    """Content of a file that is small where it is what its name says: of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read, is larger, or is not a regular file: a pipe or a device could be read for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a null character
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that nobody sees half of it; directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False, indent=1)
    # Servers send halves of surrogate pairs, which UTF-8 does not have; JSON can spell them.
    replace_file(path, re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); remove it and run the same command again") from None


def read_text(path: Path) -> str:
    """Text of a file, unpacked if its name ends in `.gz`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file that is whole.

    Raises:
        DataError: names the invalid line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}, line {number} holds half a surrogate pair, which is not a character") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); fetch or write the file again") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object; fetch or write the file again")
        rows.append(row)
    return rows


def content_hash(content: Any) -> str:
    """SHA-256 of a value's canonical JSON: the same whatever file form it was read from."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHECKSUM = "xxh3_128"
"""The algorithm of :func:`file_checksum`, as files name it."""


def file_checksum(path: Path) -> str:
    """XXH3 of a file's bytes, 128 bits: as fast as they are read, against damage and not against forgery.

    Raises:
        OSError: it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksum(content: bytes) -> str:
    """:func:`file_checksum` of what is in memory."""
    return xxhash.xxh3_128_hexdigest(content)


def file_stamp(path: Path) -> list[list[Any]]:
    """Names, sizes and times of a file, or of all files of a directory: equal as long as nobody writes them again."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    states = [(str(file.relative_to(path)), file.stat()) for file in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def is_hub_name(text: str, *, owner: bool = True) -> bool:
    """Whether a text can be the name of a repository on the Hugging Face hub.

    Args:
        text: may be it.
        owner: it has to be `OWNER/NAME`; else an old name without an owner will do, too.
    """
    return (_HUB_NAME if owner else _HUB_NAME_OR_OLD).fullmatch(text) is not None


def format_bytes(number: float) -> str:
    """A size in the binary unit that shows it best: `512 B`, `13.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/nemo_lmpo`, or `~/.cache/nemo_lmpo`.

    Raises:
        ConfigError: this user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "nemo_lmpo"
    except RuntimeError:
        raise ConfigError(
            "this user has no home directory for caches; set data.cache_dir (for evaluations NEMO_LMPO_EVAL_DATA) or "
            "XDG_CACHE_HOME"
        ) from None


@contextmanager
def file_lock(path: Path, *, timeout: float | None = None) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields False on storage without locks (some cluster file systems).

    Args:
        path: a file, made if it is not there.
        timeout: seconds to wait for another process that holds it; unset: as long as it takes.

    Raises:
        Timeout: of `filelock`; another process still holds it.
        OSError: the file cannot be made.
    """
    lock = FileLock(path, timeout=-1 if timeout is None else timeout)
    try:
        lock.acquire()
    except (NotImplementedError, OSError) as error:
        if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in NO_LOCKS):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def directory_lock(directory: Path, *, patience: float | None = None, option: str = "run_dir=") -> Iterator[None]:
    """Have a directory, by default a run's, to this process alone within the block.

    The system releases the lock when the process ends, however it ends. On file systems without locks (some cluster
    storage) there is a warning instead.

    Args:
        directory: exists.
        patience: seconds to wait for another process that holds it; unset: as long as a killed run takes to go.
        option: that named the directory, for the message, with what stands between it and the value.

    Raises:
        ConfigError: another process works there; the message has its host and number.
        OSError: the directory cannot be written.
    """
    patience = _PATIENCE_SECONDS if patience is None else patience
    with ExitStack() as held:
        try:
            locked = held.enter_context(file_lock(directory / run_files.LOCK, timeout=patience))
        except Timeout:
            raise ConfigError(
                f"{option}{directory} is in use by {_owner(directory)}; wait for it, end it, or choose another "
                f"{option.rstrip('= ')}"
            ) from None
        if not locked:
            _logger.warning("%s is on storage without file locks: do not start a second command there", directory)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 3)}
        replace_file(directory / run_files.OWNER, json.dumps(me) + "\n")
        try:
            yield
        finally:
            (directory / run_files.OWNER).unlink(missing_ok=True)


def _owner(directory: Path) -> str:
    try:
        found = json.loads((directory / run_files.OWNER).read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"process {int(found['pid'])} on host {found['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

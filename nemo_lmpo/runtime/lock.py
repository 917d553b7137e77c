"""One run a directory: a lock that ends with the process, and a note of who holds it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.atomic import replace_file

# A run that was killed holds its lock until its helpers are gone, too.
_PATIENCE_SECONDS = 5.0

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of storage that has no locks."""

_logger = logging.getLogger(__name__)


@contextmanager
def directory_lock(directory: Path, *, patience: float | None = None) -> Iterator[None]:
    """Have a run directory to this process alone within the block.

    The system releases the lock when the process ends, however it ends. On file systems without locks (some cluster
    storage) there is a warning instead.

    Args:
        directory: exists.
        patience: seconds to wait for another process that holds it; unset: as long as a killed run takes to go.

    Raises:
        ConfigError: another process works there; the message has its host and number.
        OSError: the directory cannot be written.
    """
    lock = FileLock(directory / run_files.LOCK, timeout=_PATIENCE_SECONDS if patience is None else patience)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"run_dir={directory} is in use by {_owner(directory)}; wait for it, end it, or choose another run_dir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _logger.warning("%s is on storage without file locks: do not start a second run there", directory)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 3)}
    replace_file(directory / run_files.OWNER, json.dumps(me) + "\n")
    try:
        yield
    finally:
        (directory / run_files.OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(directory: Path) -> str:
    try:
        found = json.loads((directory / run_files.OWNER).read_text())
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["since"]))
        return f"process {int(found['pid'])} on host {found['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"

"""Directories that are built once and then reused, also when several processes want one at the same time."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import Timeout

from nemo_lmpo.errors import ConfigError, DataError, shown
from nemo_lmpo.runtime.files import file_lock, user_cache

logger = logging.getLogger(__name__)

_BUILDING = ".tmp-"
"""Follows the key in the name of a directory that is being built."""


def cache_root(configured: str | None) -> Path:
    """`data.cache_dir`; unset, `$XDG_CACHE_HOME/nemo_lmpo` or `~/.cache/nemo_lmpo`.

    Raises:
        ConfigError: this user has no home directory.
    """
    if configured:
        return user_path(configured, "data.cache_dir")
    return user_cache()


def user_path(path: str, field: str) -> Path:
    """A path with `~` replaced by the home directory.

    Raises:
        ConfigError: there is no such directory; ``field`` names the setting.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{field}={shown(path)}: there is no such home directory; write the path out") from None


def cached_directory(root: Path, key: str, build: Callable[[Path], None], usable: Callable[[Path], bool]) -> Path:
    """The directory ``root/key``, built if it is not there or not usable.

    It appears by one rename after it is complete. One process builds while the others wait; on a file system without
    locks several may build, and the first one's result stays.

    Args:
        root: the cache.
        key: names the content; whatever changes the content changes the key.
        build: fills the directory it is given.
        usable: whether a directory found there is whole.

    Raises:
        DataError: the cache cannot be written.
    """
    entry = root / key
    if usable(entry):
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with file_lock(root / f"{key}.lock") as locked:
            if usable(entry):
                return entry
            if locked:
                _remove_leftovers(root, key)
                if entry.exists():
                    logger.warning("%s is damaged or of an earlier version; it is made again", entry)
            else:
                logger.warning(
                    "%s is on storage without file locks; several processes may tokenize the same data", root
                )
            _build_entry(entry, build, usable)
    except OSError as error:
        raise DataError(
            f"the cache of tokenized data in {root} cannot be written ({error.strerror or error}); "
            "free space there or set data.cache_dir to another directory"
        ) from None
    return entry


def _build_entry(entry: Path, build: Callable[[Path], None], usable: Callable[[Path], bool]) -> None:
    building = Path(tempfile.mkdtemp(prefix=f"{entry.name}{_BUILDING}", dir=entry.parent))
    try:
        build(building)
        building.chmod(0o755)
        if entry.exists():  # found unusable
            shutil.rmtree(entry, ignore_errors=True)
        try:
            building.rename(entry)
        except OSError:
            # without locks another process can have been faster: its directory is as good as this one
            if not usable(entry):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_leftovers(root: Path, own: str) -> None:
    """What killed builders left behind: of the key whose lock is held, and of all others that nobody holds.

    Where the data changed, nothing else would ever ask for the other keys again.
    """
    for leftover in root.glob(f"*{_BUILDING}*"):
        key = leftover.name.rpartition(_BUILDING)[0]
        if key == own:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        with contextlib.suppress(Timeout), file_lock(root / f"{key}.lock", timeout=0) as locked:
            if locked:
                shutil.rmtree(leftover, ignore_errors=True)

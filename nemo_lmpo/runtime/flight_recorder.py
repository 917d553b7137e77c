"""torch's flight recorder: the last collectives of each rank, written down when a run hangs.

It is on in every job of several ranks. `torchfrtrace`, which comes with torch, compares the ranks' files and names the
collective that not all of them have joined.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from nemo_lmpo.runtime.files import replace_file

PREFIX = "collectives_"
"""Of the files' names; the rank follows."""
_ENTRIES = "2000"
_SET: dict[str, str] = {}
"""What an earlier run of this process has set."""
_SLACK = 60.0
"""Seconds that lie between what ends a hang by itself and what ends it without a word."""


def record_collectives(
    directory: Path,
    *,
    step_timeout: float | None,
    collective_timeout: float,
    environ: MutableMapping[str, str] | None = None,
) -> None:
    """Set what torch reads when the process group is made; what the user set stays.

    Two threads of NCCL's backend end a process without Python: one when a collective takes too long, one when that
    first thread no longer moves, after 8 minutes unless told otherwise. Both come after the run's own watchdog here,
    which shows the stacks; and both write the recorder's file themselves before.

    Args:
        directory: where the files go.
        step_timeout: seconds of `trainer.step_timeout`.
        collective_timeout: seconds of `trainer.distributed_timeout`.
        environ: unset: this process's.
    """
    environ = os.environ if environ is None else environ
    heartbeat = max(collective_timeout, step_timeout or 0.0) + _SLACK
    wanted = {
        "TORCH_FR_BUFFER_SIZE": _ENTRIES,
        "TORCH_FR_DUMP_TEMP_FILE": str(directory.absolute() / PREFIX),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(math.ceil(heartbeat)),
    }
    for name, value in wanted.items():
        if environ.get(name) in (None, _SET.get(name)):
            environ[name] = _SET[name] = value


def dump_collectives(directory: Path, rank: int) -> Path | None:
    """Write this rank's last collectives; None where nothing was recorded.

    Raises:
        OSError: the file cannot be written.
    """
    from torch._C import _distributed_c10d as c10d

    # NCCL's recorder is one of its own; builds for CPUs have the general one only.
    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    content: bytes = dump() if dump is not None else b""
    if not content:
        return None
    path = directory / f"{PREFIX}{rank}"
    replace_file(path, content)
    return path

"""Imports once what every run needs; the fork server of a comparison loads this, and its children inherit it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _silent() -> Iterator[None]:
    # The libraries remark at length on what is not installed; each run's log has that, too.
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


with _silent():
    import nemo_lmpo.answers.engine
    import nemo_lmpo.paper.comparison.measure
    import nemo_lmpo.train
    import nemo_lmpo.training.session  # noqa: F401

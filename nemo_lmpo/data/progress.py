"""Progress bars of the libraries that read data: on a terminal only, as their carriage returns make a log one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


def on_terminal() -> bool:
    """Whether somebody watches."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def progress_bars(*, show: bool) -> Iterator[None]:
    """Inside, `datasets` and the hub show their progress bars or not."""
    import datasets
    from huggingface_hub import utils as hub

    bars = (
        (datasets.are_progress_bars_disabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
        (hub.are_progress_bars_disabled, hub.disable_progress_bars, hub.enable_progress_bars),  # type: ignore[attr-defined]
    )
    before = [are_off() for are_off, _, _ in bars]
    for _, disable, enable in bars:
        (enable if show else disable)()
    try:
        yield
    finally:
        for was_off, (_, disable, enable) in zip(before, bars, strict=True):
            (disable if was_off else enable)()

"""How a run shows that it goes on: a bar in a terminal, plain log lines everywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NoReturn, TextIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nemo_lmpo.config.schema import LoggingConfig

# Without a terminal, fast steps would fill the log of a batch job.
_SECONDS_BETWEEN_LINES = 10.0
# Time left is estimated from this many newest steps, so that a slow first step is soon forgotten.
_WINDOW_STEPS = 50

_SHOWN = (
    ("loss", "loss", ".4f"),
    ("perplexity", "perplexity", ".4g"),
    ("token_accuracy", "token accuracy", ".3f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("rewards/margins", "margin", ".3f"),
    ("samples/length", "answer tokens", ".1f"),
)

_logger = logging.getLogger(__name__)


def format_duration(seconds: float) -> str:
    """`M:SS`, `H:MM:SS` or `Nd H:MM:SS`."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    if days:
        return f"{days}d {hours}:{minutes:02d}:{second:02d}"
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """The few values worth a glance; those that are absent are left out."""
    parts = [f"{label} {metrics[name]:{form}}" for name, label, form in _SHOWN if name in metrics]
    for kind in ("pairs", "conversations", "answers"):
        if (speed := metrics.get(f"{kind}_per_second")) is not None:
            parts.append(f"{speed:.3g} {kind}/s")
    return "  ".join(parts)


class Console:
    """Shows the steps of a run; to be made on global rank 0 only.

    In a terminal it is a bar, and log lines appear above it. Elsewhere, or with ``logging.progress_bar=false``,
    it is a log line at the first and the last step and at every ``logging.log_interval`` steps between, with at
    least ten seconds from line to line.
    """

    def __init__(
        self,
        config: LoggingConfig,
        *,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the display.

        Args:
            config: whether a bar is wanted, and the interval of lines.
            total_steps: steps of the whole run.
            start_step: finished steps of the checkpoint that is resumed.
            stream: where the bar goes; standard error by default.
            clock: seconds, replaceable in tests.
        """
        self._total = total_steps
        self._interval = max(1, config.log_interval)
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=_WINDOW_STEPS + 1)
        self._last_line: float | None = None
        self._stack = ExitStack()
        self._bar: tqdm[NoReturn] | None = None
        target = stream if stream is not None else sys.stderr
        if config.progress_bar and target.isatty():
            self._bar = self._open_bar(target, start_step)

    def _open_bar(self, stream: TextIO, start_step: int) -> tqdm[NoReturn]:
        bar = tqdm(
            total=self._total,
            initial=start_step,
            desc="train",
            file=stream,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._stack.callback(bar.close)
        # Messages of other parts would otherwise be drawn into the bar. A logger without handlers of its own is
        # left alone: it would get one, and print what it passes on to the root a second time.
        loggers = [logger for logger in (logging.getLogger(), logging.getLogger("nemo_lmpo")) if logger.handlers]
        self._stack.enter_context(logging_redirect_tqdm(loggers=loggers))
        return bar

    def seconds_left(self) -> float | None:
        """Estimate from the newest steps; None before the first one."""
        first_step, first_time = self._marks[0]
        step, now = self._marks[-1]
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * max(0, self._total - step)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are finished; ``metrics`` under their logged names."""
        now = self._clock()
        is_first = self._last_line is None and len(self._marks) == 1
        self._marks.append((step, now))
        left = self.seconds_left()
        text = format_metrics(metrics)
        if left is not None:
            text += f"  {format_duration(left)} left"
        if self._bar is not None:
            if step % self._interval == 0 or is_first or step >= self._total:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        is_due = self._last_line is None or now - self._last_line >= _SECONDS_BETWEEN_LINES
        if is_first or step >= self._total or (step % self._interval == 0 and is_due):
            self._last_line = now
            _logger.info("step %d/%d  %s", step, self._total, text)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the result of a validation after ``step``; names without the prefix `val/`."""
        _logger.info("validation at step %d/%d  %s", step, self._total, format_metrics(metrics))

    def close(self) -> None:
        """Leave the display; can be called twice."""
        self._stack.close()
        self._bar = None

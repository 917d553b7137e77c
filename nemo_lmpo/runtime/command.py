"""How every command runs: arguments, log, signals, errors in one sentence, exit status.

A command is a parser whose defaults name its function: ``parser.set_defaults(run=function)``. Further defaults that
:func:`run_parser` reads: ``when_interrupted`` (what a user can do then), ``own_signals`` (the function handles SIGTERM
and Ctrl-C itself), and ``leave`` (called last with the exit status).
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from nemo_lmpo.errors import Lines, TrainingError, UserError, printable, printable_lines, without_secrets
from nemo_lmpo.runtime.credentials import hide_credentials
from nemo_lmpo.runtime.interruption import Interrupted, raising_when_interrupted

RESUME = "run the same command to resume"
_TRACEBACK = "--traceback"
_REMEDIES = {
    errno.ENOSPC: "free disk space, then run the same command again",
    errno.EDQUOT: "free disk space, then run the same command again",
    errno.EACCES: "check its permissions, or give another path",
    errno.EPERM: "check its permissions, or give another path",
    errno.EROFS: "give a path that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "give another path",
    errno.EISDIR: "give another path",
    errno.EEXIST: "give another path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def run_parser(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one message.

    Overrides (`key=value`) and options may stand in any order. ``--traceback`` anywhere shows tracebacks.

    Args:
        parser: of the command.
        arguments: of the command line; unset: those of the process.

    Returns:
        The exit status: 0, 1 for an error, 128 + the signal's number when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != _TRACEBACK]
    hide_credentials()
    options = _parse(parser, words)
    options.traceback = len(words) < len(given)
    options.command_line = f"{parser.prog} {shlex.join(map(without_secrets, words))}"
    start_logging()
    status = _guarded(options)
    leave: Callable[[int], int] = getattr(options, "leave", lambda status: status)
    return leave(status)


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    said = io.StringIO()  # argparse repeats what it does not understand
    try:
        with redirect_stderr(said):
            # Plain parse_args gives up at the second group of overrides.
            options, rest = parser.parse_known_args(words)
            if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
                parser.error(f"unrecognized arguments: {' '.join(rest)}")
    finally:
        sys.stderr.write(without_secrets(printable_lines(said.getvalue())))
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def leave_out_working_directory() -> None:
    """Import nothing more from the working directory, where `python -m` looks first: a folder of data holds no code.

    Hydra, for one, imports whatever is called `hydra_plugins`. A checkout that is the working directory stays, and so
    does what `PYTHONPATH` names.
    """
    here, checkout = os.path.realpath(os.curdir), os.path.realpath(Path(__file__).parents[2])
    named = [os.path.realpath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if sys.path and os.path.realpath(sys.path[0]) == here and here not in (checkout, *named):
        del sys.path[0]


def start_logging() -> None:
    """The package's messages and everybody's warnings, as plain lines on standard error.

    Not what libraries say of each other's coming versions, which no user can change; `python -W default` shows it.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("nemo_lmpo").setLevel(logging.INFO)


def _guarded(options: argparse.Namespace) -> int:
    caught: BaseException
    signals = nullcontext() if getattr(options, "own_signals", False) else raising_when_interrupted()
    try:
        with signals:
            status: int = options.run(options)
            return status
    except (UserError, TrainingError) as error:
        message, caught = str(error), error
    except BrokenPipeError:
        # Whoever read the output has enough, as `| head` does; nothing more can be written, not even on leaving.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        message, caught = without_secrets(os_error_message(error)), error
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", None) or [getattr(options, "when_interrupted", "")]
        _say(": ".join(["interrupted", *filter(None, notes)]))
        return error.status if isinstance(error, Interrupted) else 128 + signal.SIGINT
    if options.traceback:
        sys.stderr.write(without_secrets(printable_lines("".join(traceback.format_exception(caught)))))
    for line in (message if isinstance(message, Lines) else printable(message)).split("\n"):
        _say(line if line.startswith(" ") else f"error: {line}")  # indented lines are details of the one above
    return 1


def os_error_message(error: OSError) -> str:
    """One sentence with the path, what the system says, and a remedy where the kind of error has one."""
    said = error.strerror or str(error) or type(error).__name__
    place = f"{error.filename}: " if error.filename is not None else ""
    remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    return f"{place}{said[:1].lower() + said[1:] if place else said}{remedy}"


def _say(line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    except BrokenPipeError:
        pass


def answer(text: str) -> None:
    """Write a page for people to standard output: in it too, text from outside cannot act on the terminal."""
    sys.stdout.write(f"{printable_lines(text)}\n")

"""The one door: every command in the table, one manner of errors, signals, output that nobody reads, and completion."""

from __future__ import annotations

import errno
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

import pytest

from nemo_lmpo import cli
from nemo_lmpo.errors import Lines, TrainingError, UserError
from nemo_lmpo.runtime.command import os_error_message, run_parser


def running(work: Callable[[Namespace], int], **defaults: object) -> ArgumentParser:
    parser = ArgumentParser(prog="nemo-lmpo try")
    parser.add_argument("--number", type=int)
    parser.add_argument("overrides", nargs="*")
    parser.set_defaults(run=work, **defaults)
    return parser


def raising(error: BaseException) -> ArgumentParser:
    def work(options: Namespace) -> int:
        raise error

    return running(work, when_interrupted="run the same command to resume")


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_parser_that_names_its_function(command: cli.Command) -> None:
    parser = command.build_parser(f"nemo-lmpo {command.name}")
    assert parser.prog == f"nemo-lmpo {command.name}"
    leaves = [parser]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            leaves = list(action.choices.values())
    assert leaves
    for leaf in leaves:
        assert callable(leaf.get_default("run")), leaf.prog
        assert leaf.description or leaf is not parser


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command.name} " in shown and command.summary in shown for command in cli.COMMANDS)
    assert max(map(len, shown.splitlines())) <= 105
    assert cli.main([]) == 2
    assert capsys.readouterr().err == shown


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["genrate", "--checkpoint", "x"]) == 2
    assert capsys.readouterr().err == "error: nemo-lmpo has no command 'genrate'; did you mean generate?\n"
    assert cli.main(["bananas"]) == 2
    assert "known: train, check, plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("a=1 is wrong; set a=2"), 1, "error: a=1 is wrong; set a=2\n"),
        (UserError(Lines("one\ntwo")), 1, "error: one\nerror: two\n"),
        (UserError(Lines("one; remedy\n  detail")), 1, "error: one; remedy\n  detail\n"),
        (TrainingError("the loss is not finite"), 1, "error: the loss is not finite\n"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"),
            1,
            "error: /x/y: no such file or directory; check the path\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: No space left on device; free disk space, then run the same command again\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: run the same command to resume\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parser(raising(error), []) == status
    assert capsys.readouterr().err == said


def test_errors_of_our_own_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_parser(raising(ZeroDivisionError()), [])


def test_traceback_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parser(raising(UserError("wrong")), ["--traceback"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert said.endswith("error: wrong\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_with_one_line(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    def work(options: Namespace) -> int:
        signal.raise_signal(number)
        return 0

    # Whoever starts the tests may ignore it, as nohup does, and then the command does, too.
    ignored = signal.signal(number, signal.SIG_DFL)
    try:
        assert run_parser(running(work, when_interrupted="nothing was left behind"), []) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, ignored)
    assert capsys.readouterr().err == "interrupted: nothing was left behind\n"


def test_overrides_on_both_sides_of_an_option() -> None:
    seen: list[Namespace] = []
    parser = running(lambda options: seen.append(options) or 0)  # type: ignore[func-returns-value]
    assert run_parser(parser, ["a=1", "--number", "3", "b=2", "c=3"]) == 0
    assert (seen[0].overrides, seen[0].number) == (["a=1", "b=2", "c=3"], 3)
    assert seen[0].command_line == "nemo-lmpo try a=1 --number 3 b=2 c=3"
    with pytest.raises(SystemExit):
        run_parser(parser, ["a=1", "--unknown", "b=2"])


def test_leave_gets_the_status() -> None:
    left: list[int] = []

    def leave(status: int) -> int:
        left.append(status)
        return 7

    assert run_parser(running(lambda options: 3, leave=leave), []) == 7
    assert left == [3]


def test_messages_of_the_system_name_path_and_remedy() -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  (any)
        os.mkdir("/proc/nowhere/x")  # noqa: PTH102
    assert os_error_message(caught.value).startswith("/proc/nowhere/x: no such file or directory; ")

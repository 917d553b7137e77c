"""Answers outlive interruptions: what resumes ends with the bits of what was never interrupted, and leaves nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers import engine
from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.generate.__main__ import main
from nemo_lmpo.generate.kept import SUFFIX
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.session import open_session
from tests.unit.generate.test_generate import OVERRIDES

PROMPTS = [f"sort {' '.join(letters)}" for letters in ("dac", "hb", "qezt", "ba", "wvu", "cab", "zyx")]
SAMPLED = ["--temperature", "1.5", "--seed", "7", "--top-k", "20"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers with letters, as training saves it."""
    root = tmp_path_factory.mktemp("kept")
    overrides = [*OVERRIDES, f"run_dir={root / 'run'}", f"data.cache_dir={root / 'cache'}"]
    with open_session(load_recipe("sft_tiny", overrides), LaunchInfo()) as session:
        session.train(0.0)
        session.files.save_to(root / "model")
    return root / "model"


class Command:
    """`generate` on seven prompts, two per batch."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.output = model, folder / "answers.jsonl"
        self.journal = folder / f"answers.jsonl{SUFFIX}"
        self.prompts = folder / "prompts.jsonl"
        self.prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))

    def __call__(self, *more: str, output: Path | None = None) -> int:
        arguments = ["--checkpoint", str(self.model), "--prompts", str(self.prompts), "--max-new-tokens", "6"]
        arguments += ["--batch-size", "2", "--quiet", "--output", str(output or self.output)]
        return main([*arguments, *more])

    def rows(self) -> list[dict[str, Any]]:
        """Answers in the journal."""
        lines = self.journal.read_text(encoding="utf-8").split("\n")[1:]
        return [json.loads(line) for line in lines if line]


@pytest.fixture
def command(model: Path, tmp_path: Path) -> Command:
    return Command(model, tmp_path)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Send a signal before so many batches more; None: never."""
    real = engine.Generator._batch
    state: dict[str, Any] = {"left": None, "signal": signal.SIGINT}

    def batch(self: Any, *arguments: Any) -> Any:
        if state["left"] is not None:
            if state["left"] == 0:
                signal.raise_signal(state["signal"])
            state["left"] -= 1
        return real(self, *arguments)

    monkeypatch.setattr(engine.Generator, "_batch", batch)
    # As started from a terminal, also where the tests were not: a background job's children ignore Ctrl-C.
    before: dict[Any, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in before.items():
        before[number] = signal.signal(number, handler)
    yield lambda left, number=signal.SIGINT: state.update(left=left, signal=number)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("how", [[], SAMPLED], ids=["greedy", "sampled"])
def test_any_interruption_ends_with_the_same_bits(
    command: Command, interrupt: Any, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    assert command(*how) == 0
    expected = command.output.read_bytes()
    assert len({row["response"] for row in map(json.loads, expected.splitlines())}) > 1
    assert not command.journal.exists()
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        command.output.unlink()
        for batches in (0, 1, 2):
            interrupt(batches, number)
            assert command(*how) == status
            assert not command.output.exists()
            # Two per batch, and what an earlier one answered is not asked again.
            kept = len(command.rows())
            assert kept == {0: 0, 1: 2, 2: 6}[batches]
            said = capsys.readouterr().err
            assert said == f"interrupted: {kept} of 7 answers are in {command.journal}; the same command resumes\n"
        interrupt(None)
        assert command(*how) == 0
        assert command.output.read_bytes() == expected
        assert sorted(path.name for path in command.output.parent.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_every_cut_of_the_journal_ends_with_the_same_bits(command: Command, interrupt: Any) -> None:
    """As after kill -9 or a power failure, at any byte: of a row, of a batch, of the settings."""
    interrupt(3)
    assert command(*SAMPLED) == 130
    whole = command.journal.read_bytes()
    interrupt(None)
    assert command(*SAMPLED) == 0
    expected = command.output.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in {0, 1, *ends, ends[0] - 1, ends[1] - 1, ends[2] + 3, len(whole) - 2}:
        command.journal.write_bytes(whole[:length])
        assert command(*SAMPLED) == 0
        assert command.output.read_bytes() == expected
        assert not command.journal.exists()


def test_answers_do_not_depend_on_what_was_done_before(command: Command) -> None:
    """Each batch has a seed of its own: the last prompts alone are answered as together with the others."""
    generator = engine.load_generator(command.model)
    prompts = [[5, 6, 7 + index % 3][: 2 + index % 2] for index in range(6)]
    sampling = Sampling(max_new_tokens=8, temperature=2.0, seed=3, batch_size=2)
    every = generator.respond(prompts, sampling)
    for done in (set(), {0, 2}, {0, 1, 2, 4}):
        found: dict[int, Answer] = {}
        for batch in generator.batches(prompts, sampling, done):
            found.update(batch)
        assert found
        assert all(every[index] == response for index, response in found.items())
    # Three batches of equal prompts in pairs: equal seeds would give equal answers.
    same = generator.respond([[5, 6, 7]] * 6, sampling)
    assert len({tuple(response.token_ids) for response in same}) > 2


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (["--temperature", "0.5"], "temperature"),
        (["--seed", "8"], "seed"),
        (["--batch-size", "3"], "batch_size"),
        (["--max-new-tokens", "7"], "max_new_tokens"),
        (["--limit", "5"], "prompts"),
        (["--system-prompt", "sort"], "prompts"),
    ],
)
def test_another_command_does_not_continue_it(
    command: Command, interrupt: Any, capsys: pytest.CaptureFixture[str], more: list[str], name: str
) -> None:
    interrupt(1)
    assert command(*SAMPLED) == 130
    kept = command.journal.read_bytes()
    capsys.readouterr()
    assert command(*SAMPLED, *more) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"an interrupted command with {name} " in said
    assert command.journal.read_bytes() == kept


def test_a_model_written_again_does_not_continue_it(
    command: Command, interrupt: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    command.model = Path(shutil.copytree(command.model, tmp_path / "model"))
    interrupt(1)
    assert command() == 130
    weights = max(command.model.rglob("*"), key=lambda path: path.stat().st_size)
    os.utime(weights, ns=(0, 0))
    assert command() == 1
    assert "an interrupted command with its files " in capsys.readouterr().err


def test_two_commands_do_not_write_one_output(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_lmpo.answers.journal import Journal

    with Journal(command.journal, "index"):
        assert command() == 1
    assert "is in use by another command" in capsys.readouterr().err
    assert command() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is not a regular file"),
        (lambda path: os.mkfifo(path), "is not a regular file"),
        (lambda path: path.symlink_to("/dev/null"), "is not a regular file"),
        (lambda path: path.symlink_to(path.parent / "prompts.jsonl"), "is the file of the prompts"),
        (lambda path: path.symlink_to(path.parent / "none" / "file"), "its directory does not exist"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_work(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    monkeypatch.setattr(engine, "open_prompting", lambda *_, **__: pytest.fail("work began"))
    make(command.output)
    assert command() == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_work(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "open_prompting", lambda *_, **__: pytest.fail("work began"))
    assert command(output=Path("/proc/answers.jsonl")) == 1
    assert "its directory cannot be written" in capsys.readouterr().err


def test_a_full_disk_loses_no_answer(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third batch's rows are cut in the middle, as a full disk does."""
    assert command() == 0
    expected = command.output.read_bytes()
    real, written = os.write, 0

    def write(file: int, content: Any) -> int:
        nonlocal written
        written += 1
        if written == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, content[: len(content) // 2] if written == 4 else content)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        assert command() == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert len(command.rows()) == 4
    assert command.journal.read_bytes().endswith(b"\n")
    assert command() == 0
    assert command.output.read_bytes() == expected


def test_a_link_is_followed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    command.output.symlink_to(tmp_path / "elsewhere" / "real.jsonl")
    assert command() == 0
    assert command.output.is_symlink()
    assert len(command.output.read_text().splitlines()) == len(PROMPTS)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_any_terminal_shows_every_answer(command: Command, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """What an encoding has no character for is a JSON escape, so that what is printed reads as what was answered."""
    answers = iter(["caf\u00e9", "\u4f60\u597d \U0001f600", "plain", "\u2028", "\x85", "a", "b"])
    monkeypatch.setattr(engine.Generator, "_response", lambda self, ids: Answer(next(answers), ids))
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    arguments = ["--checkpoint", str(command.model), "--prompts", str(command.prompts), "--max-new-tokens", "2"]
    assert main([*arguments, "--quiet", "--batch-size", "8"]) == 0
    lines = [json.loads(line) for line in raw.getvalue().decode(encoding).split("\n") if line]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert {line["response"] for line in lines} == {
        "caf\u00e9",
        "\u4f60\u597d \U0001f600",
        "plain",
        "\u2028",
        "\x85",
        "a",
        "b",
    }


def test_what_is_printed_outlives_an_interruption(
    command: Command, interrupt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(2)
    arguments = ["--checkpoint", str(command.model), "--prompts", str(command.prompts), "--max-new-tokens", "2"]
    assert main([*arguments, "--quiet", "--batch-size", "2"]) == 130
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 4
    assert shown.err == "interrupted: 4 of 7 answers are printed; with --output FILE the same command resumes\n"

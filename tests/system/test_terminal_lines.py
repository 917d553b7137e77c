"""Texts from outside that try to act on the terminal, or to look like lines of ours, in everything that is printed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo import cli
from nemo_lmpo.errors import Lines, printable_lines
from nemo_lmpo.runtime.credentials import _Records
from tests.system.processes import SMALL, training

CONVERT = ("convert", "hf-to-nemo", "--input")
FORGED = "error: forged"
BREAKS = "\r\n\x0b\x0c\x1c\x85\u2028\u2029"
PLANTED = f"x\x1b[31m\x1b]0;title\x07\x08\u202ey\x9b2J{''.join(f'{sign}{FORGED}' for sign in BREAKS)}"


def check(output: str) -> None:
    lines = output.split("\n")
    strange = [line for line in lines if not line.isprintable()]
    assert not strange, strange[:3]
    forged = [line for line in lines if line.removeprefix("error: ").startswith(("forged", FORGED))]
    assert not forged, forged[:3]


def row(number: int, **more: Any) -> dict[str, Any]:
    said = {"prompt": f"p{number} {PLANTED}", "chosen": f"c {PLANTED}", "rejected": f"r{number} {PLANTED}"}
    return {"id": f"{number} {PLANTED}", **said, **more}


def test_an_ordinary_run(tmp_path: Path) -> None:
    """Rows, columns and ids as others wrote them, from the start to the report."""
    rows = [row(number, **{f"column {PLANTED}": 1}) for number in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    bad = [{"prompt": PLANTED, "chosen": PLANTED}, {PLANTED: 1}, row(1, rejected=f"c {PLANTED}")]
    (tmp_path / "rows.jsonl").open("a").write("".join(json.dumps(one) + "\n" for one in bad))
    options = (
        *("--config-name", "lmpo_tiny", *SMALL, "run_dir=run", "trainer.max_steps=2", "data.train.path=rows.jsonl"),
        *("data.on_bad_row=skip", "data.train.limit=null", "logging.report=true"),
        *("logging.samples=1", "logging.sample_tokens=4", "data.validation.path=rows.jsonl", "data.max_length=600"),
        *("data.max_prompt_length=300", "model.architecture.max_position_embeddings=600"),
    )
    with training(options, tmp_path) as process:
        process.join(timeout=120)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    assert "forged" in output, "the example shows a row"
    check(output)


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status = cli.main(arguments)
    except SystemExit as left:
        status = int(left.code or 0)
    found = capsys.readouterr()
    assert status != 0, found
    return found.err


@pytest.fixture(autouse=True)
def own_records() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


def rows_file(*rows: Any, name: str = "rows.jsonl") -> Callable[[Path], list[str]]:
    def make(place: Path) -> list[str]:
        (place / name).write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in rows))
        return ["train", "lmpo_tiny", f"data.train.path='{place / name}'", "dry_run=true"]

    return make


def run_with(file: str, content: str) -> Callable[[Path], list[str]]:
    def make(place: Path) -> list[str]:
        run = place / "run"
        run.mkdir()
        (run / file).write_text(content)
        return ["report", str(run)]

    return make


def model_with(file: str, content: str) -> Callable[[Path], list[str]]:
    def make(place: Path) -> list[str]:
        model = place / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / file).write_text(content)
        return ["convert", "hf-to-nemo", "--input", str(model), "--output", str(place / "out.nemo")]

    return make


PLACES: dict[str, Callable[[Path], list[str]]] = {
    "a word of the command": lambda place: ["train", "lmpo_tiny", f"loss.{PLANTED}=1"],
    "a recipe's name": lambda place: ["train", PLANTED],
    "a command's name": lambda place: [PLANTED],
    "an option": lambda place: ["report", f"--{PLANTED}"],
    "a run directory": lambda place: ["report", str(place / PLANTED)],
    "a model's path": lambda place: [
        "convert",
        "hf-to-nemo",
        "--input",
        str(place / PLANTED),
        "--output",
        str(place / "out.nemo"),
    ],
    "a field of a row": rows_file({PLANTED: 1}),
    "a row's value": rows_file({"prompt": PLANTED, "chosen": [PLANTED], "rejected": {PLANTED: PLANTED}}),
    "a role": rows_file({"chosen": [{"role": PLANTED, "content": PLANTED}], "rejected": [{"role": PLANTED}]}),
    "a broken line": rows_file('{"prompt": "' + PLANTED.replace("\n", " ")),
    "a metric's file": run_with("metrics.jsonl", PLANTED),
    "a model's kind": model_with("config.json", json.dumps({"model_type": PLANTED})),
    "a model's setting": model_with("config.json", json.dumps({"model_type": "llama", "hidden_size": PLANTED})),
    "a setting's name": model_with("config.json", json.dumps({"model_type": "llama", PLANTED: PLANTED})),
    "a broken config": model_with("config.json", PLANTED),
    "an index": model_with("model.safetensors.index.json", json.dumps({"weight_map": {PLANTED: PLANTED}})),
}


@pytest.mark.parametrize("place", PLACES)
def test_messages_of_errors(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(said(PLACES[place](tmp_path), capsys))


def test_a_recipe_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = json.dumps(PLANTED)
    for number, text in enumerate((f"{planted}: 1", f"loss: {{{planted}: 1}}", f"optim: {{lr: {planted}}}", planted)):
        (tmp_path / f"own{number}.yaml").write_text(f"defaults: [lmpo_tiny, _self_]\n{text}\n")
        check(said(["train", f"own{number}", "--config-dir", str(tmp_path)], capsys))
    shutil.rmtree(tmp_path)


def test_log_records_of_anybody(capsys: pytest.CaptureFixture[str]) -> None:
    make = _Records(logging.LogRecord)

    def shown(name: str, message: str, *arguments: object) -> str:
        return make(name, logging.WARNING, "f.py", 1, message, arguments, None).getMessage()

    for name in ("nemo_lmpo.data", "transformers.utils"):
        for value in (PLANTED, ValueError(PLANTED), Path(PLANTED), [PLANTED], {PLANTED: 1}, PLANTED.encode()):
            text = shown(name, "read %s", value)
            assert "\n" not in text
            check(text)
    check(shown("transformers.utils", f"a message {PLANTED}"))
    assert shown("nemo_lmpo.monitor", "%s", Lines("a\nb")) == "a\nb"
    assert shown("nemo_lmpo.monitor", "%d of %.2f", 3, 0.5) == "3 of 0.50"
    assert shown("x", "%(a)s", {"a": "\n"}) == r"\n"
    assert printable_lines("a\tb\nc", indent="  ") == "  a       b\n  c"

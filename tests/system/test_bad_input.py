"""Wrong input gives one message that says what to do, exit status 1, and loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.train import main
from tests.system.processes import SMALL
from tests.unit.formats.tiny_models import save

GOOD = {"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama3", tmp_path_factory.mktemp("llama") / "hf")


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def refused(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one message; nothing but the configuration may have been written."""
    status = main(
        ["--config-name", "lmpo_tiny", *SMALL, "trainer.max_steps=1", "model.global_batch_size=1", *overrides]
    )
    errors = capsys.readouterr().err
    assert status == 1, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    run = Path("runs/lmpo_tiny")
    assert not (run / "checkpoints").exists()
    assert not (run / "metrics.jsonl").exists()
    return lines[0]


DATA: dict[str, tuple[list[Any] | None, tuple[str, ...]]] = {
    "missing": (None, ("pairs.jsonl",)),
    "empty": ([], ("pairs.jsonl",)),
    "broken_json": ([GOOD, '{"prompt": "x", '], ("pairs.jsonl", "2")),
    "fields_missing": ([GOOD, {"prompt": "sort", "chosen": "a"}], ("pairs.jsonl", "rejected")),
    "empty_response": ([GOOD, {**GOOD, "chosen": ""}], ("pairs.jsonl", "2", "chosen")),
    "equal_responses": ([{**GOOD, "rejected": "a b"}], ("pairs.jsonl", "1")),
    "not_text": ([{**GOOD, "chosen": 5}], ("pairs.jsonl", "1", "chosen")),
    "too_few": ([GOOD], ("model.global_batch_size=2", "1 training pairs")),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows, expected = DATA[case]
    if rows is not None:
        write(Path("pairs.jsonl"), *rows)
    extra = ("model.global_batch_size=2",) if case == "too_few" else ()
    message = refused(capsys, "data.train.path=pairs.jsonl", *extra)
    assert all(part in message for part in expected), message


def test_no_row_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("pairs.jsonl"), {**GOOD, "rejected": "a b"}, {**GOOD, "chosen": ""})
    message = refused(capsys, "data.train.path=pairs.jsonl", "data.on_bad_row=skip")
    assert "no row is left" in message or "no usable row" in message, message


def test_vocabulary_larger_than_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "model.architecture.vocab_size=20")
    assert "vocab_size is 20" in message
    assert "use the model's own tokenizer" in message


def test_weights_of_another_architecture(llama: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((llama / "config.json").read_text())
    (workplace / "other").mkdir()
    for path in llama.iterdir():
        shutil.copy(path, workplace / "other" / path.name)
    (workplace / "other" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    message = refused(capsys, "model.restore_from_path=other", "model.tokenizer=null")
    assert "model_type 'gpt2' is not supported; supported: llama, mistral" in message


def test_a_model_directory_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "./nowhere does not exist" in refused(capsys, "model.restore_from_path=./nowhere")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.tensor_model_parallel_size=2", ("1 processes", "a multiple of 2")),
        ("model.tensor_model_paralel_size=2", ("did you mean model.tensor_model_parallel_size",)),
        ("trainer.max_time_per_run=soon", ("'soon' is not a duration", "DD:HH:MM:SS")),
        ("model.architecture.num_key_value_heads=3", ("num_attention_heads=8", "num_key_value_heads=3")),
        ("model.architecture.model_type=lama", ("'lama'", "did you mean 'llama'")),
        ("model.tokenizer=builtin:tony", ("builtin:tony does not exist", "builtin:tiny")),
    ],
)
def test_settings(override: str, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, override)
    assert all(part in message for part in expected), message
    assert not Path("runs").exists(), "refused before any work"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have them")
@pytest.mark.parametrize("setting", ["model.transformer_engine=true", "model.attention_backend=te"])
def test_kernels_that_only_gpus_have(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert setting in refused(capsys, setting)
    assert not Path("runs").exists()


def test_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-name", "lmpo_tinny"]) == 1
    assert "did you mean lmpo_tiny?" in capsys.readouterr().err
    assert main([]) == 1
    assert "no recipe is given" in capsys.readouterr().err


def test_directory_of_another_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = workplace / "runs" / "lmpo_tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("optim: {lr: 5.0}\n")
    kept = '{"step": 1}\n'
    (run / "metrics.jsonl").write_text(kept)
    assert main(["--config-name", "lmpo_tiny", *SMALL]) == 1
    message = capsys.readouterr().err
    assert "holds another run" in message
    assert "optim.lr: 5.0 before, 0.001 now" in message
    assert (run / "config.yaml").read_text() == "optim: {lr: 5.0}\n"
    assert (run / "metrics.jsonl").read_text() == kept


def test_the_traceback_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-name", "lmpo_tiny", *SMALL, "traceback=true", "data.train.path=none.jsonl"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback (most recent call last)" in errors
    assert errors.splitlines()[-1].startswith("error: ")


def test_a_mistake_can_be_corrected_in_the_same_directory(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "data.train.path=mistyped.jsonl")
    write(workplace / "pairs.jsonl", GOOD, {**GOOD, "prompt": "sort c a", "chosen": "a c"})
    command = ["--config-name", "lmpo_tiny", *SMALL, "model.global_batch_size=2", "trainer.max_steps=1"]
    assert main([*command, "data.train.path=pairs.jsonl", "data.validation.path=null"]) == 0
    assert (workplace / "runs" / "lmpo_tiny" / "checkpoints" / "step_0000001").is_dir()

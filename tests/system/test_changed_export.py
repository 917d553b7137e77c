"""An export of a run that was changed afterwards: every stage that uses it names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_lmpo.convert.command import hf_to_nemo
from nemo_lmpo.export.__main__ import main as export
from nemo_lmpo.formats.export_record import RECORD
from nemo_lmpo.generate.__main__ import main as generate
from nemo_lmpo.train import main as train
from tests.system.processes import SMALL


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed") / "run"
    assert train(["--config-name", "lmpo_tiny", *SMALL, "trainer.max_steps=1", f"run_dir={folder}"]) == 0
    assert export([str(folder)]) == 0
    return folder / "huggingface"


def _generate(model: Path, place: Path) -> int:
    (place / "prompts.jsonl").write_text(json.dumps({"prompt": "one"}) + "\n")
    output = ["--output", str(place / "answers.jsonl"), "--max-new-tokens", "2"]
    return generate(["--model", str(model), "--prompts", str(place / "prompts.jsonl"), *output])


def _train(model: Path, place: Path) -> int:
    start = [f"model.restore_from_path={model}", "trainer.max_steps=1", f"run_dir={place / 'next'}"]
    return train(["--config-name", "lmpo_tiny", *SMALL, *start])


STAGES: dict[str, Callable[[Path, Path], int]] = {
    "generate": _generate,
    "convert": lambda model, place: hf_to_nemo(["--input", str(model), "--output", str(place / "x.nemo"), "--quiet"]),
    "train": _train,
}


def _flip(path: Path) -> None:
    """A weight becomes another finite number."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_every_stage_names_the_file_that_was_changed(
    stage: str, name: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    if name == "model.safetensors":
        _flip(model / name)
    else:
        (model / name).write_text((model / name).read_text() + " ")
    assert STAGES[stage](model, tmp_path) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{model}: {name} is not what was written there: it has " in said
    assert f"remove {model / RECORD}" in said
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".nemo" or path.name.startswith(".")]


@pytest.mark.parametrize("stage", STAGES)
def test_an_unchanged_one_and_one_without_its_record_are_used(stage: str, exported: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(exported, tmp_path / "model"))
    if stage != "convert":  # who removes the record means the change
        _flip(model / "model.safetensors")
        (model / RECORD).unlink()
    assert STAGES[stage](model, tmp_path) == 0

"""Which row of the paper a run stands for, and what of a model is hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.answers.identity import check_one_bos, weights_hash
from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.evaluate.model import default_name, parse_row, trained_row
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, generation_settings
from tests.unit.formats.tiny_models import save


@pytest.mark.parametrize(
    ("config", "row"),
    [
        ({"name": "lmpo_llama3_8b", "loss": {"name": "lmpo", "lam": 0.2}}, ("llama3_8b_instruct", "LMPO", None)),
        ({"name": "lmpo_mistral_7b_base", "loss": {"name": "lmpo", "lam": 1.0}}, ("mistral_7b_base", "LMPO", None)),
        (
            {"name": "lmpo_mistral_7b_base", "loss": {"name": "lmpo", "lam": 0.2}},
            ("mistral_7b_base", "LMPO", "lambda=0.2"),
        ),
        ({"name": "simpo_tiny", "loss": {"name": "simpo"}}, ("tiny", "SimPO", None)),
        (
            {"name": "lmpo_llama3_8b_base", "loss": {"name": "lmpo", "lam": 0.2, "margin": "cube"}},
            ("llama3_8b_base", "LMPO", "cube"),
        ),
        (
            {"name": "lmpo_llama3_8b_base", "loss": {"name": "lmpo", "lam": 0.2, "z_score": False}},
            ("llama3_8b_base", "LMPO", "no_z_score"),
        ),
        (
            {"name": "lmpo_x", "loss": {"name": "lmpo", "average_length_normalization": False}},
            ("x", "LMPO", "no_average_length"),
        ),
        ({}, (None, None, None)),
    ],
)
def test_rows_of_runs(config: dict[str, Any], row: tuple[Any, ...]) -> None:
    assert trained_row(config) == row


def test_rows_as_given() -> None:
    assert parse_row("llama3_8b_base/lmpo/cube") == ("llama3_8b_base", "LMPO", "cube")
    assert parse_row("mistral_7b_base/SimPO") == ("mistral_7b_base", "SimPO", None)
    assert parse_row("tiny/LMPO/lambda=0.05") == ("tiny", "LMPO", "lambda=0.05")
    for wrong in ("LMPO", "tiny/PPO", "tiny/LMPO/quartic", "/LMPO", ""):
        with pytest.raises(ConfigError, match="names no row"):
            parse_row(wrong)


def test_names() -> None:
    assert default_name("runs/lmpo_tiny") == "lmpo_tiny"
    assert default_name("runs/lmpo_tiny/checkpoints/step_0000010") == "lmpo_tiny_step_0000010"
    assert default_name("out/model.nemo") == "model"
    assert default_name("princeton-nlp/Llama-3") == "Llama-3"


def test_two_bos_are_refused() -> None:
    check_one_bos({"a": [1, 5], "b": [5, 1, 1], "c": [1]}, 1, "instruction")
    check_one_bos({"a": [1, 1]}, None, "instruction")
    with pytest.raises(DataError, match="instruction b begins with two BOS"):
        check_one_bos({"a": [1, 5], "b": [1, 1, 5]}, 1, "instruction")


def test_the_papers_settings() -> None:
    found = [
        generation_settings(ALPACA_EVAL, name) for name in ("mistral_7b_base", "mistral_7b_instruct", "llama3_8b_base")
    ]
    assert [(one.temperature, one.max_new_tokens) for one in found] == [(0.7, 2048), (0.5, 2048), (0.9, 4096)]
    assert generation_settings(ARENA_HARD, "mistral_7b_base").temperature == 0


def test_weights_have_one_hash_in_every_form(tmp_path: Path) -> None:
    from nemo_lmpo.formats.conversion import plan, write_nemo
    from nemo_lmpo.formats.model_files import open_model

    directory = save("llama2", tmp_path / "hf")
    archive = tmp_path / "model.nemo"
    write_nemo(plan(open_model(directory), archive))
    hashes = {
        weights_hash(open_model(path), path, tmp_path / f"{path.name}.kept", lambda _: None)
        for path in (directory, archive)
    }
    assert len(hashes) == 1
    other = save("llama3", tmp_path / "other")
    assert weights_hash(open_model(other), other, tmp_path / "kept", lambda _: None) not in hashes


def test_weights_are_hashed_again_only_if_they_changed(tmp_path: Path) -> None:
    from nemo_lmpo.formats.model_files import open_model

    directory, folder = save("llama2", tmp_path / "hf"), tmp_path / "kept"
    read: list[int] = []
    first = weights_hash(open_model(directory), directory, folder, read.append)
    count = len(read)
    assert weights_hash(open_model(directory), directory, folder, read.append) == first
    assert len(read) == count > 0
    (directory / "model.safetensors").touch()
    assert weights_hash(open_model(directory), directory, folder, read.append) == first
    assert len(read) == 2 * count

"""Hugging Face directories are read as transformers reads them: a part of what `make fuzz` tries."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.architecture import architecture_from_hf
from nemo_lmpo.formats.model_files import open_model
from tests.fuzz.against_transformers import Change, Judge, combined_changes, field_changes, weight_changes
from tests.unit.formats import tiny_models as tiny

CHANGES = (
    *(change for change in weight_changes() if change.must_load),
    *islice(field_changes(), 0, None, 120),
    *islice(combined_changes(), 0, 800, 40),
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return Judge(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_change(change: Change, judge: Judge) -> None:
    assert judge(change) is None


def test_parent_of_checkpoints(tmp_path: Path) -> None:
    """As Megatron-LM leaves it: a folder for each step, and none of the files of a model beside them."""
    for step in (100, 2000):
        (tmp_path / f"iter_{step:07}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2000")
    with pytest.raises(CheckpointError, match=r"checkpoints of 2 steps; give one of them, .*/iter_0002000"):
        open_model(tmp_path)


def test_adapters_beside_a_model(tmp_path: Path) -> None:
    directory = tiny.save("llama3", tmp_path / "hf")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapters beside a model"):
        open_model(directory)


def test_other_models_are_not_mistaken_for_misspellings() -> None:
    for name in ("ministral", "mistral3", "llama4", "qwen", "qwen3_5"):
        with pytest.raises(CheckpointError) as told:
            architecture_from_hf({"model_type": name})
        assert "did you mean" not in str(told.value)
    with pytest.raises(CheckpointError, match="did you mean 'llama'"):
        architecture_from_hf({"model_type": "lama"})

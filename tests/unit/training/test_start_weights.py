"""A start model whose weights are not finite is refused before anything is trained, and its tensor is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer
from nemo_lmpo.errors import CheckpointError
from tests.unit.checkpoint.runs import one_process, open_session
from tests.unit.formats.tiny_models import save

NAME = "model.layers.2.mlp.down_proj.weight"


def spoiled(folder: Path, value: float) -> Path:
    start = save("llama3", folder / "start")
    tiny_tokenizer().save_pretrained(start)
    tensors = load_file(start / "model.safetensors")
    tensors[NAME][1, 2] = value
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    return start


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_tensor_is_named(value: float, tmp_path: Path) -> None:
    start = spoiled(tmp_path, value)
    told = rf"the start model {start} holds NaN or infinity in {NAME}; give a start model whose weights are finite"
    with one_process() as place, pytest.raises(CheckpointError, match=told):
        open_session(place, tmp_path / "run", f"model.restore_from_path={start}", "model.architecture=null")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_numbers_that_the_precision_cannot_hold(tmp_path: Path) -> None:
    start = spoiled(tmp_path, torch.finfo(torch.float32).max)
    overrides = (f"model.restore_from_path={start}", "model.architecture=null")
    with one_process() as place:
        open_session(place, tmp_path / "float32", *overrides)
        with pytest.raises(CheckpointError, match=r"trainer\.precision=bf16 cannot hold .*layers\.2\.mlp\.linear_fc2"):
            open_session(place, tmp_path / "bf16", *overrides, "trainer.precision=bf16")

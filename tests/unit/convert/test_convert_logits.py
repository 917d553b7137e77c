"""The converted model computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf, verify
from tests.unit.formats import tiny_models as tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_agree(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.save(family, tmp_path / "hf")
    arguments = ["--input", str(source), "--output", str(tmp_path / "m.nemo"), "--verify", "--quiet"]
    assert hf_to_nemo(arguments) == 0
    printed = capsys.readouterr().out
    assert "0 differ" in printed
    assert "passed: tolerance 0.0001" in printed


def test_verification_after_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.save("llama2", tmp_path / "hf")
    common = ["--quiet", "--verify", "--dtype", "bf16"]
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "m.nemo"), *common]) == 0
    assert "rounded to bfloat16" in capsys.readouterr().out
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "wide.nemo"), "--quiet"]) == 0
    assert nemo_to_hf(["--input", str(tmp_path / "wide.nemo"), "--output", str(tmp_path / "b"), *common]) == 0
    assert "0 differ" in capsys.readouterr().out


def test_verification_fails_on_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.save("llama2", tmp_path / "hf")
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "m.nemo"), "--quiet"]) == 0
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert verify(["--hf", str(source), "--nemo", str(tmp_path / "m.nemo"), "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "1 differ, largest difference 0.25 (model.layers.2.mlp.up_proj.weight)" in printed
    assert "FAILED" in printed

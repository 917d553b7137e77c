"""What `--verify` sees beyond tensors: windows that no short prompt reaches, rotary embeddings, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.convert.command import hf_to_nemo, verify
from nemo_lmpo.convert.positions import positions_difference
from nemo_lmpo.formats.architecture import Architecture, RopeScaling, read_architecture
from tests.unit.formats import tiny_models as tiny

WINDOW = 32768
MIXED = ["full_attention", "sliding_attention"] * 2
CONTEXT = {"max_position_embeddings": 131072}


def _with_config(directory: Path, model: str, values: dict[str, Any]) -> Path:
    directory.mkdir()
    config = {**tiny.config(model).to_dict(), **CONTEXT}
    config.pop("layer_types", None)  # which transformers worked out without the values
    config.update(values)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("model", tiny.FAMILIES)
def test_equal_descriptions(model: str, tmp_path: Path) -> None:
    values = {"sliding_window": WINDOW} if model == "mistral_v01" else {}
    directory = _with_config(tmp_path / "hf", model, values)
    architecture = read_architecture(directory)
    # An expert's output is weighed before its last matrix here, and behind it there.
    rounding = 0.0 if architecture.experts is None else 2e-5
    assert positions_difference(directory, architecture) <= rounding


@pytest.mark.parametrize(
    ("model", "values", "wrong"),
    [
        # Ministral 8B as it was read: a window in all layers, in none, and another one.
        ("mistral_v01", {"sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 16}, lambda a: a),
        ("mistral_v01", {"sliding_window": WINDOW}, lambda a: replace(a, sliding_window=None)),
        ("mistral_v01", {"sliding_window": WINDOW}, lambda a: replace(a, sliding_window=WINDOW - 1)),
        ("qwen25", {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1}, lambda a: a),
        ("llama31", {}, lambda a: replace(a, rope_scaling=None)),
        ("llama31", {"original_max_position_embeddings": 4}, lambda a: a),
        ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, lambda a: a),
        ("llama3", {}, lambda a: replace(a, rope_theta=10000.0)),
        ("llama3", {}, lambda a: replace(a, rope_scaling=RopeScaling("linear", 2.0))),
        ("llama3", {}, lambda a: replace(a, rms_norm_eps=0.1)),
    ],
)
def test_other_descriptions(
    model: str, values: dict[str, Any], wrong: Callable[[Architecture], Architecture], tmp_path: Path
) -> None:
    """The config on disk and a description that does not fit it, as a reader with a fault would make it."""
    plain = {"sliding_window": WINDOW} if model == "mistral_v01" else {}
    architecture = read_architecture(_with_config(tmp_path / "plain", model, plain))
    assert positions_difference(_with_config(tmp_path / "hf", model, values), wrong(architecture)) > 0.01


def _converted(tmp_path: Path) -> tuple[Path, Path]:
    source, output = tiny.save("llama3", tmp_path / "hf"), tmp_path / "nemo"
    assert hf_to_nemo(["--input", str(source), "--output", str(output), "--quiet"]) == 0
    return source, output


def test_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = _converted(tmp_path)
    command = ["--hf", str(source), "--nemo", str(output), "--quiet"]
    assert verify(command) == 0
    told = capsys.readouterr().out
    assert "positions beyond every window, and at the end of the context: largest difference 0" in told
    assert "tokenizer: 7 texts, 0 differ" in told
    path = output / "huggingface" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {"content": "w9", "id": 9, "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**added, "normalized": False})
    path.write_text(json.dumps(tokenizer))
    assert verify(command) == 1
    told = capsys.readouterr().out
    assert "tokenizer: 8 texts, 1 differ (first 'aw9b w9 c')" in told
    assert "FAILED" in told
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (output / "huggingface" / name).unlink()
    assert verify(command) == 0
    assert f"tokenizer: not compared; {output} holds none" in capsys.readouterr().out


def test_other_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = _converted(tmp_path)
    path = output / "huggingface" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "w5"}))
    assert verify(["--hf", str(source), "--nemo", str(output), "--quiet"]) == 1
    assert "eos_token_id 2 and 5" in capsys.readouterr().out

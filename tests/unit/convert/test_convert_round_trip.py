"""Hugging Face -> NeMo -> Hugging Face, for every family, dtype and output form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf
from nemo_lmpo.formats.export_record import RECORD
from tests.unit.formats import tiny_models as tiny


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def _same_tensors(left: Path, right: Path) -> None:
    expected, found = _tensors(left), _tensors(right)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _same_side_files(left: Path, right: Path) -> None:
    def content(directory: Path) -> dict[str, bytes]:
        kept = (path for path in directory.iterdir() if "safetensors" not in path.name and path.name != RECORD)
        return {path.name: path.read_bytes() for path in kept}

    expected = content(left)
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= expected.keys()
    assert content(right) == expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_round_trip_is_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny.save(family, tmp_path / "hf", dtype)
    nemo = tmp_path / ("model.nemo" if dtype is torch.bfloat16 else "model_directory")
    assert hf_to_nemo(["--input", str(source), "--output", str(nemo), "--quiet"]) == 0
    assert nemo_to_hf(["--input", str(nemo), "--output", str(tmp_path / "back"), "--quiet"]) == 0
    _same_tensors(source, tmp_path / "back")
    _same_side_files(source, tmp_path / "back")


def test_sharded_input_and_output(tmp_path: Path) -> None:
    source = tiny.save("llama3", tmp_path / "hf", max_shard_size="200KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "m.nemo"), "--quiet"]) == 0
    arguments = ["--input", str(tmp_path / "m.nemo"), "--output", str(tmp_path / "back"), "--max-shard-gb", "0.0002"]
    assert nemo_to_hf([*arguments, "--quiet"]) == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    _same_tensors(source, tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in _tensors(source).values())
    assert index["metadata"]["total_size"] == total
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, tmp_path / "back")]
    assert torch.equal(*logits)


def test_other_dtype_changes_tensors_and_config_only(tmp_path: Path) -> None:
    source = tiny.save("mistral_v01", tmp_path / "hf", torch.float32)
    output = tmp_path / "m.nemo"
    assert hf_to_nemo(["--input", str(source), "--output", str(output), "--dtype", "bf16", "--quiet"]) == 0
    assert nemo_to_hf(["--input", str(output), "--output", str(tmp_path / "back"), "--quiet"]) == 0
    for name, tensor in _tensors(source).items():
        assert torch.equal(_tensors(tmp_path / "back")[name], tensor.to(torch.bfloat16)), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back"))
    assert (before.pop("dtype"), after.pop("dtype")) == ("float32", "bfloat16")
    assert before == after
    assert AutoConfig.from_pretrained(tmp_path / "back").dtype == torch.bfloat16


def test_result_loads_with_transformers(tmp_path: Path) -> None:
    source = tiny.save("llama31", tmp_path / "hf")
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "m.nemo"), "--quiet"]) == 0
    assert nemo_to_hf(["--input", str(tmp_path / "m.nemo"), "--output", str(tmp_path / "back"), "--quiet"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]
    assert "w3" in tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False)
    model, information = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert model.generation_config.temperature == 0.7
    assert model.config.rope_parameters["rope_type"] == "llama3"

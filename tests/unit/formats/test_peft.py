"""Adapters that `peft` saved: merged weights and logits are those of peft; more than plain LoRA is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nemo_lmpo.answers.engine import transformers_model
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.adapters import AdapterDescription, named_base
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.formats.fingerprint import weights_fingerprint
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.peft import PeftAdapter
from tests.unit.formats import tiny_models as tiny


def adapted(base: Path, directory: Path, **settings: Any) -> torch.nn.Module:
    """Save an adapter as peft does; the model as peft merges it."""
    torch.manual_seed(5)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    merged: torch.nn.Module = model.merge_and_unload()
    return merged


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save("llama3", tmp_path / "base")


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"layers_to_transform": [1]}, {"target_modules": "all-linear"}],
    ids=["plain", "rslora", "one layer", "all-linear"],
)
def test_is_what_peft_computes(base: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    expected = adapted(base, tmp_path / "adapter", **settings).state_dict()
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    files = open_model(find_model(tmp_path / "adapter").path)
    assert files.kind == "peft"
    found = transformers_model(files, torch.float32).state_dict()
    assert found.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, start[name])
    layers = 1 if "layers_to_transform" in settings else 4
    assert changed == layers * (7 if settings.get("target_modules") == "all-linear" else 2)


def test_identity_holds_the_base(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "adapter")
    architecture = open_model(base).architecture
    before = weights_fingerprint(tmp_path / "adapter", architecture)
    tiny.save("llama3", base, torch.bfloat16)
    assert weights_fingerprint(tmp_path / "adapter", architecture) != before


def _changed(directory: Path, **values: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


OTHERS: dict[str, object] = {
    "bias": "all",
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "modules_to_save": ["lm_head"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "use_dora": True,
    "peft_type": "IA3",
}


@pytest.mark.parametrize("name", OTHERS)
def test_more_than_plain_lora_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    adapted(base, tmp_path / "adapter")
    _changed(tmp_path / "adapter", **{name: OTHERS[name]})
    expected = "does not describe LoRA" if name == "peft_type" else re.escape(f"{name}=")
    with pytest.raises(CheckpointError, match=expected):
        PeftAdapter(tmp_path / "adapter")


def test_every_field_of_peft_is_read_or_refused(base: Path, tmp_path: Path) -> None:
    """A field that a newer peft brings, set to something, must not pass by silently."""
    from nemo_lmpo.formats.peft import _READ_OR_SHOWN_BY_TENSORS

    adapted(base, tmp_path / "adapter")
    content = (tmp_path / "adapter" / "adapter_config.json").read_text()
    for of in dataclasses.fields(LoraConfig):
        if of.name in _READ_OR_SHOWN_BY_TENSORS:
            continue
        (tmp_path / "adapter" / "adapter_config.json").write_text(content)
        _changed(tmp_path / "adapter", **{of.name: {"something": 1}})
        with pytest.raises(CheckpointError, match=of.name):
            PeftAdapter(tmp_path / "adapter")


def test_damage_is_named(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapted(base, adapter)
    _changed(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path: .*gone does not exist"):
        open_model(adapter)
    _changed(adapter, base_model_name_or_path=str(adapter))
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        open_model(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        PeftAdapter(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="save the adapter as safetensors"):
        PeftAdapter(adapter)


def test_a_base_from_the_hub_has_its_name_there(tmp_path: Path) -> None:
    """Not the place of this machine's cache."""
    cached = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "d04e592bb4f6"
    described = AdapterDescription(4, 8.0, 0.0, ("q_proj",), str(cached), 42, "hash")
    assert named_base(described, "x") == ("meta-llama/Llama-3.1-8B", "d04e592bb4f6")
    local = dataclasses.replace(described, base=str(tmp_path / "base"))
    assert named_base(local, "x") == (str(tmp_path / "base"), None)
    with pytest.raises(CheckpointError, match="x holds adapters of random weights"):
        named_base(dataclasses.replace(described, base=None), "x")

"""The converted model computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_lmpo.convert.__main__ import hf_to_nemo, nemo_to_hf, verify
from nemo_lmpo.convert.verify import megatron_model, model_logits
from nemo_lmpo.formats.model_files import open_model
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


def _greedy(next_logits: object, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(next_logits(ids)[-1].argmax())]  # type: ignore[operator]
    return ids


@pytest.mark.slow
def test_smollm2(smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ["--input", str(smollm2_dir), "--output", str(tmp_path / "m.nemo"), "--verify", "--quiet"]
    assert hf_to_nemo(arguments) == 0
    assert "passed: tolerance 0.0001" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    with megatron_model(open_model(tmp_path / "m.nemo")) as model:
        found = _greedy(lambda ids: model_logits(model, ids), ids, len(expected) - len(ids))
    assert tokenizer.decode(found[len(ids) :]) == tokenizer.decode(expected[len(ids) :])
    assert "Paris" in tokenizer.decode(found[len(ids) :])

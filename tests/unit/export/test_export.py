"""A run as a Hugging Face directory: what `transformers` loads, and what the card says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.evaluate.result import BY_INSTRUCTION, Judge, Model, Result, Value, write_result
from nemo_lmpo.export.card import hub_names
from nemo_lmpo.export.write import export_run
from nemo_lmpo.train import main
from tests.system.processes import SMALL


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "lmpo_small"
    steps = ("trainer.max_steps=2", "trainer.val_check_interval=1")
    assert main(["--config-name", "lmpo_tiny", *SMALL, *steps, f"run_dir={folder}", "checkpoint.export_hf=true"]) == 0
    return folder


def evaluated(folder: Path) -> Path:
    result = Result(
        suite="arena_hard",
        model=Model("lmpo_small", "runs/lmpo_small", "training", "tiny", "LMPO"),
        values={"wr": Value(41.5, 1.0, {BY_INSTRUCTION: (39.0, 44.0)})},
        n=500,
        of=500,
        unparsed=0,
        truncated=0,
        empty=0,
        judge=Judge("judge", {"judge-2026": 1000}, "http://localhost/v1", "hash"),
        date="2026-11-24T00:00:00+00:00",
        generation={},
        packages={},
        evaluation_set={"name": "arena_hard", "sha256": "0"},
        command="python",
    )
    write_result(folder / "arena_hard", result, {})
    return folder


def test_the_export_answers_as_the_checkpoint(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_lmpo.answers.engine import load_generator

    output = export_run(run, tmp_path / "hf", evaluations=[evaluated(tmp_path / "evals")])
    generator = load_generator(run, device="cpu")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "sort b a"}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"] if hasattr(ids, "keys") else ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, generator.model(ids).logits)
    assert (output / "chat_template.jinja").read_text() == generator.encoder.chat.template
    check_card((output / "README.md").read_text(), output)


def check_card(card: str, output: Path) -> None:
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "transformers"
    assert "lmpo" in metadata["tags"]
    assert "base_model" not in metadata  # random weights are no model of the hub
    [result] = metadata["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["metrics"][0]["value"]) == ("arena_hard", 41.5)
    assert "| Arena-Hard v0.1 | win rate | 41.50 | 39.00 to 44.00 | 500 | judge-2026 | 2026-11-24 |" in body
    assert "python -m nemo_lmpo.train --config-name lmpo_tiny" in body
    pictures = [line.split("](")[1].rstrip(")") for line in body.splitlines() if line.startswith("![")]
    assert pictures
    assert all((output / path).is_file() for path in pictures)


def test_a_run_exports_itself_at_its_end(run: Path) -> None:
    names = {path.name for path in (run / "huggingface").iterdir()}
    assert {"README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"} <= names


def test_names_of_the_hub_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert hub_names(["princeton-nlp/llama3-ultrafeedback", "builtin:tiny", str(tmp_path / "a"), None]) == [
        "princeton-nlp/llama3-ultrafeedback"
    ]
    assert hub_names("HuggingFaceH4/zephyr") == ["HuggingFaceH4/zephyr"]


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a model"):
        export_run(tmp_path, tmp_path / "hf")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists"):
        export_run(run, tmp_path / "there")
    assert (tmp_path / "there" / "mine").exists()


def test_the_same_export_again_writes_no_weights(run: Path, tmp_path: Path) -> None:
    """Again after that of the run itself at its end."""
    output = Path(shutil.copytree(run / "huggingface", tmp_path / "hf"))
    weights = output / "model.safetensors"
    before = weights.stat()
    export_run(run, output, evaluations=[evaluated(tmp_path / "evals")])
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "| Arena-Hard v0.1 |" in (output / "README.md").read_text()
    with pytest.raises(CheckpointError, match="exists"):
        export_run(run, output, dtype="fp16")
    export_run(run, output, dtype="fp16", overwrite=True)
    assert weights.stat().st_size < before.st_size
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="exists"):
        export_run(run, output, dtype="fp16")

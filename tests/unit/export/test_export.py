"""A run as a Hugging Face directory: what `transformers` loads, and what the card says."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.evaluate.bootstrap import Interval
from nemo_lmpo.evaluate.result import BY_INSTRUCTION, Judge, Model, Result, Value, write_result
from nemo_lmpo.export.card import build_card
from nemo_lmpo.export.origin import Origin, origin_of, public_config
from nemo_lmpo.export.write import export_run
from nemo_lmpo.formats.public_names import hub_names
from nemo_lmpo.report.read import read_run
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
        values={"wr": Value(41.5, 1.0, {BY_INSTRUCTION: Interval(39.0, 44.0)})},
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
    assert hub_names("data/pairs.jsonl") == []  # moved since


def test_the_cards_example_runs_as_it_stands(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With torch and transformers alone."""
    monkeypatch.chdir(run)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code = (run / "huggingface" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, "card", "exec"), {})
    assert "<user> Hello" in capsys.readouterr().out.replace("<unk>", "Hello")


HEAD = """---
license: other
license_name: llama3.1
license_link: https://example.org/license
base_model: [meta-llama/Llama-3.1-8B]
datasets: [owner/first, owner/second]
language: [en, de]
model-index: [{name: x}]
---
# A model
"""


def test_a_card_has_what_the_starts_own_card_says(tmp_path: Path) -> None:
    start, run = tmp_path / "start", tmp_path / "sft"
    start.mkdir()
    (start / "README.md").write_text(HEAD)
    direct = origin_of(trained_from(start, "owner/pairs"))
    assert direct == Origin(
        ("meta-llama/Llama-3.1-8B",),
        ("owner/pairs", "owner/first", "owner/second"),
        ("en", "de"),
        "other",
        "llama3.1",
        "https://example.org/license",
    )
    # A run that started there hands it on, with its own pairs.
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(trained_from(start, "owner/sft")))
    assert origin_of(trained_from(run, "owner/pairs")).datasets == ("owner/pairs", "owner/sft", *direct.datasets[1:])
    (run / "config.yaml").write_text(yaml.safe_dump(trained_from(run, "owner/sft")))  # a circle
    assert origin_of(trained_from(run, "owner/pairs")).license is None
    cached = tmp_path / "models--owner--name" / "snapshots" / "1a2b"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text(HEAD)
    assert origin_of(trained_from(cached, "x")).base_model == ("owner/name",)
    assert origin_of(trained_from(None, "owner/pairs")) == Origin(datasets=("owner/pairs",))


def test_the_written_card_has_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(HEAD)
    written = build_card(replace(read_run(run), config=trained_from(tmp_path, "owner/pairs")), "name", "name", [], [])
    metadata = yaml.safe_load(written.split("---\n")[1])
    said = yaml.safe_load(HEAD.split("---\n")[1])
    for name in ("license", "license_name", "license_link", "language"):
        assert metadata[name] == said[name], name
    assert metadata["base_model"] == "meta-llama/Llama-3.1-8B"
    assert metadata["datasets"] == ["owner/pairs", *said["datasets"]]


@pytest.mark.parametrize("head", ["", "---\n[1\n---\n", "---\n- a\n---\n", "---\nlicense: [1, {a: b}]\n---\n", "\0"])
def test_a_card_that_says_nothing_gives_nothing(head: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(head)
    assert origin_of(trained_from(tmp_path, "x")) == Origin()


def trained_from(start: Path | None, data: str) -> dict[str, Any]:
    return {
        "model": {"restore_from_path": None if start is None else str(start), "tokenizer": "/secret/words"},
        "data": {"train": {"path": data}, "validation": {"path": ["/secret/held_out.jsonl"]}},
        "loss": {"name": "lmpo"},
    }


def test_a_card_names_no_place_of_this_machine(run: Path, tmp_path: Path) -> None:
    config = trained_from(tmp_path / "secret" / "base", "/secret/pairs.jsonl")
    card = build_card(replace(read_run(run), config=config), "name", "name", [], [])
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert "Trained from base with LMPO on the preference pairs of pairs.jsonl" in card.replace("\\", "")
    checkpoint = trained_from(tmp_path / "secret" / "sft" / "checkpoints" / "step_0000012", "owner/pairs")
    assert public_config(checkpoint)["model"]["restore_from_path"] == "sft, step_0000012"
    assert public_config(checkpoint)["data"]["train"]["path"] == "owner/pairs"
    assert config["model"]["tokenizer"] == "/secret/words"
    assert str(run.parent) not in (run / "huggingface" / "README.md").read_text()


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

"""Every form of a model as MODEL of every command: it does its job, or says in one sentence what to do instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from nemo_lmpo import cli
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.nemo import nemo_config

ASSET = Path(__file__).parents[1] / "assets" / "written_by_a3f51bc"
FORMS = ("run", "checkpoint", "nemo", "nemo2", "huggingface", "hub", "adapter")
HUB_NAME = "somebody/tiny"
NEMO2_MODEL = "nemo.collections.llm.gpt.model.llama.LlamaModel"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same weights in every form."""
    root = tmp_path_factory.mktemp("forms")
    shutil.copytree(ASSET / "run", root / "run")
    checkpoint = root / "run" / "checkpoints" / "step_0000004"
    assert cli.main(["convert", "nemo-to-hf", "--input", str(checkpoint), "--output", str(root / "hf"), "--quiet"]) == 0
    nemo = root / "policy.nemo"
    assert cli.main(["convert", "hf-to-nemo", "--input", str(root / "hf"), "--output", str(nemo), "--quiet"]) == 0
    return {
        "run": str(root / "run"),
        "checkpoint": str(checkpoint),
        "nemo": str(nemo),
        "nemo2": str(_nemo2(root / "nemo2", checkpoint)),
        "huggingface": str(root / "hf"),
        "hub": HUB_NAME,
        "adapter": str(_adapter(root / "adapter", root / "hf")),
    }


def _nemo2(directory: Path, checkpoint: Path) -> Path:
    """A NeMo 2 directory as NeMo lays it out: `context/model.yaml`, tokenizer, and the same distributed weights."""
    model = open_model(checkpoint)
    shutil.copytree(checkpoint / "state", directory / "weights")
    shutil.copytree(checkpoint / "tokenizer", directory / "context" / "nemo_tokenizer")
    settings = nemo_config(model.architecture, "bf16", {})
    names = {
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_query_groups",
        "kv_channels": "kv_channels",
        "layernorm_epsilon": "layernorm_epsilon",
        "max_position_embeddings": "seq_length",
        "rotary_base": "rotary_base",
    }
    config = {target: settings[source] for source, target in names.items() if source in settings}
    config |= {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaConfig",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": model.architecture.tie_word_embeddings,
        "make_vocab_size_divisible_by": 1,
    }
    (directory / "context" / "model.yaml").write_text(yaml.safe_dump({"_target_": NEMO2_MODEL, "config": config}))
    return directory


def _adapter(directory: Path, base: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def hub(forms: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's download, which there is none of here, finds the directory in its cache."""
    import huggingface_hub

    def snapshot(name: str, **options: object) -> str:
        assert name == HUB_NAME
        return forms["huggingface"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)


def train(model: str, folder: Path) -> list[str]:
    run = f"run_dir={folder / 'out'}"
    return ["check", "--config-name", "lmpo_tiny", f"model.restore_from_path={model}", "model.architecture=null", run]


def generate(model: str, folder: Path) -> list[str]:
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "sort b a"}) + "\n")
    given = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "out"), "--max-new-tokens", "2"]
    return ["generate", "--model", model, *given, "--quiet"]


def evaluate(model: str, folder: Path) -> list[str]:
    return ["evaluate", "export", "--model", model, "--output", str(folder / "out")]


def export(model: str, folder: Path) -> list[str]:
    return ["export", model, "--output", str(folder / "out")]


def hf_to_nemo(model: str, folder: Path) -> list[str]:
    return ["convert", "hf-to-nemo", "--model", model, "--output", str(folder / "out"), "--quiet"]


def nemo_to_hf(model: str, folder: Path) -> list[str]:
    return ["convert", "nemo-to-hf", "--model", model, "--output", str(folder / "out"), "--quiet"]


def verify(model: str, folder: Path) -> list[str]:
    return ["convert", "verify", "--hf", str(folder.parent / "hf"), "--nemo", model, "--tensors-only", "--quiet"]


IS_HF = "is a Hugging Face directory already; to publish it, use `hf upload`"
NOT_OF_A_RUN = (
    "does not belong to a run, which the model card would describe; to get its weights, use `nemo-lmpo convert"
)
IS_NEMO = "is a NeMo model already; to get a Hugging Face one, use nemo-to-hf"
REMEDIES: dict[tuple[str, str], str] = {
    ("export", "nemo"): NOT_OF_A_RUN,
    ("export", "nemo2"): NOT_OF_A_RUN,
    ("export", "adapter"): NOT_OF_A_RUN,
    ("export", "huggingface"): IS_HF,
    ("export", "hub"): IS_HF,
    ("hf_to_nemo", "nemo"): IS_NEMO,
    ("hf_to_nemo", "nemo2"): IS_NEMO,
    ("nemo_to_hf", "huggingface"): "is a Hugging Face model already; to get a NeMo one, use hf-to-nemo",
    ("nemo_to_hf", "hub"): "is a Hugging Face model already; to get a NeMo one, use hf-to-nemo",
}
"""Cells in which there is nothing to do, and what is said."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "command", [train, generate, evaluate, export, hf_to_nemo, nemo_to_hf, verify], ids=lambda command: command.__name__
)
def test_cell(
    command: Callable[[str, Path], list[str]],
    form: str,
    forms: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = forms[form]
    if command is verify:
        arguments = ["convert", "verify", "--hf", forms["huggingface"], "--nemo", model, "--tensors-only", "--quiet"]
    else:
        arguments = command(model, tmp_path)
    status = cli.main(arguments)
    said = capsys.readouterr()
    remedy = REMEDIES.get((command.__name__, form))
    if remedy is not None:
        assert status == 1
        assert remedy in said.err
        assert len(said.err.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return
    # The adapter changes the weights, and `verify` has to see it.
    assert status == (1 if (command, form) == (verify, "adapter") else 0), said.err
    if command in (export, nemo_to_hf) or (command is evaluate and form not in ("huggingface", "hub")):
        assert open_model(tmp_path / "out").kind == "huggingface"
    if command is hf_to_nemo:
        assert open_model(tmp_path / "out").kind == "nemo"
    if command is generate:
        assert json.loads((tmp_path / "out").read_text())["tokens"] <= 2


@pytest.mark.parametrize("given", ["checkpoints", "newest"])
def test_no_one_has_to_name_a_step(given: str, forms: dict[str, str], tmp_path: Path) -> None:
    """A run and its folder of checkpoints mean the newest one."""
    run = Path(forms["run"])
    model = run / "checkpoints" if given == "checkpoints" else run
    assert cli.main(["convert", "nemo-to-hf", "--model", str(model), "--output", str(tmp_path / "hf"), "--quiet"]) == 0
    expected, found = open_model(Path(forms["checkpoint"])).source, open_model(tmp_path / "hf").source
    for name in found.names():
        assert torch.equal(found.get(name), expected.get(name))


@pytest.mark.parametrize("command", ["generate", "evaluate", "export", "hf_to_nemo", "nemo_to_hf", "train"])
def test_nothing_there(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(globals()[command](str(tmp_path / "nowhere"), tmp_path)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "nowhere does not exist; give a run, checkpoint, .nemo file" in said

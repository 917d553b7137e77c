"""Exports in transformers 4.57, which much else still stands on, compute what they compute in the installed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.convert.command import nemo_to_hf
from nemo_lmpo.data.builtin.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer
from nemo_lmpo.export.__main__ import main as export
from nemo_lmpo.train import main as train
from tests.system import read_model
from tests.system.processes import SMALL
from tests.unit.formats import tiny_models as tiny

FAMILIES = ("llama31", "mistral_v02", "qwen25", "qwen3", "mixtral", "qwen3_moe")
MIXTURES = FAMILIES[4:]
LORA = ("model.peft.name=lora", "model.peft.rank=4", "model.peft.alpha=32", "optim.lr=1e-2")
RANDOM = "random weights"
VARIABLE = "NEMO_LMPO_TRANSFORMERS_4"
_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def older() -> Path:
    place = Path(os.environ.get(VARIABLE, _ROOT / ".venv-transformers-4"))
    if not (place / "transformers").is_dir():
        pytest.skip(f"run `make transformers-4`, or set {VARIABLE} to a folder that `pip install --target` made")
    return place


def start_model(family: str, directory: Path) -> Path:
    """A model that the installed transformers saves in its own way, with a tokenizer for the generated task."""
    tiny.save(family, directory)
    if family == "qwen25":
        qwen_tokenizer().save_pretrained(directory)
    else:
        tiny_tokenizer().save_pretrained(directory)
    return directory


def qwen_tokenizer() -> Any:
    """Byte by byte, with tokens of its own for the roles; transformers 5 reads Qwen2 with no other class."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab={**letters, "<|endoftext|>": 256}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<|endoftext|>").replace("{{ bos_token }}", "")
    return tokenizer


@pytest.fixture(scope="module")
def exports(older: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("older")
    runs = {RANDOM: ["model.architecture.model_type=llama", "model.architecture.rope_theta=500000.0"]}
    for family in FAMILIES:
        start = start_model(family, root / f"start_{family}")
        runs[family] = [f"model.restore_from_path={start}", "model.architecture=null", "model.tokenizer=null"]
        if family in MIXTURES:
            # On the export: what transformers 5 saves of a mixture, 4.57 takes for one of 128 experts.
            base = f"model.restore_from_path={root / family / 'huggingface'}"
            runs[f"{family} merged"] = [base, *runs[family][1:], *LORA]
    rest = [setting for setting in SMALL if "architecture" not in setting]
    for name, settings in runs.items():
        directory = root / name.replace(" ", "_")
        length = ["data.max_length=128", "data.max_prompt_length=64"]
        assert (
            train(
                ["--config-name", "lmpo_tiny", *rest, *length, "trainer.max_steps=1", f"run_dir={directory}", *settings]
            )
            == 0
        )
        assert export([str(directory)]) == 0
    found = {name: root / name.replace(" ", "_") / "huggingface" for name in runs}
    for family in MIXTURES:
        found[f"{family} adapter"] = root / f"{family}_adapter"
        command = ["--input", str(root / f"{family}_merged"), "--output", str(found[f"{family} adapter"]), "--adapter"]
        assert nemo_to_hf([*command, "--quiet"]) == 0
    return found


def test_exports_in_transformers_4(older: Path, exports: dict[str, Path]) -> None:
    """Logits differ by the two versions' order of sums in float32 at most; ids, text and dtype not at all."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(older), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, read_model.__file__, *map(str, exports.values())]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    there = json.loads(ended.stdout.splitlines()[-1])
    assert there["version"].startswith("4.57.")
    logits_here: dict[str, torch.Tensor] = {}
    for name, directory in exports.items():
        here, found = read_model.read_model(str(directory)), there["found"][str(directory)]
        expected, logits = torch.tensor(here.pop("logits")), torch.tensor(found.pop("logits"))
        logits_here[name] = expected
        assert found == here, name
        assert expected.std() > 0.01, name
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=f"{name}: {{}}".format)
    for family in MIXTURES:
        merged, adapted, other = (logits_here[f"{family}{kind}"] for kind in (" merged", " adapter", ""))
        torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
        assert (merged - other).abs().max() > 1e-2  # without adapters the run learned something else
    assert "rope_parameters" in (exports["llama31"].parent.parent / "start_llama31" / "config.json").read_text()

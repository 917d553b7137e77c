"""README's way from a base model to the paper's tables, command by command, with small stand-ins for what is large.

The commands are those of the page, run by a shell. What is replaced, and nothing else: names of models, data, judge and
servers, and how much of everything is done. Recipes, layouts and splits stay.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nemo_lmpo.data.templates import LLAMA3
from nemo_lmpo.evaluate.environment import VARIABLE
from tests.distributed.training_runs import metrics_of
from tests.system.stub_server import MODEL, serving
from tests.system.test_evaluate import check_wins

pytestmark = [
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"set {VARIABLE} (make eval-env)"),
    pytest.mark.timeout(1800),
]

ROOT = Path(__file__).resolve().parents[2]
OPENING = "From a base model to the paper's tables"
STEPS, BATCH, PROMPTS, SAMPLES, INSTRUCTIONS = 2, 4, 12, 5, 10
SERVED = "http://localhost:8000/v1"
SMALL = (
    f"model.architecture=null model.global_batch_size={BATCH} trainer.max_steps={STEPS} trainer.num_threads=1 "
    "optim.lr=1e-3 logging.report=false logging.tensorboard=false logging.progress_bar=false"
)
"""The recipe's sizes are those of 8B; its learning rates are too low for two steps to change anything in bfloat16."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
VLLM = """#!/bin/sh
[ "$1" = serve ] && shift && exec {python} {server} "$1" --port $TEST_PORT
"""
"""In vLLM's place a server that answers by transformers, with the model that it is given."""


def commands() -> list[str]:
    """The page's lines; a command that goes over several is one."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    block: str
    (block,) = re.findall(rf"\n{OPENING}[^`]*```bash\n(.*?)```", page, re.DOTALL)
    assert len(block.splitlines()) <= 10, "ten lines"
    return [re.sub(r" +# .*", "", line) for line in block.replace("\\\n", " ").splitlines()]


def save_tokenizer(folder: Path, template: str | None) -> PreTrainedTokenizerFast:
    """Bytes, and the tokens that Llama 3 has for its chat."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )
    words.chat_template = template
    words.save_pretrained(folder)
    return words


def save_model(folder: Path, kind: type[PreTrainedModel], template: str | None, **more: float) -> None:
    words = save_tokenizer(folder, template)
    torch.manual_seed(3)
    tokens = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    kind(LlamaConfig(vocab_size=len(words) + 3, **tokens, **SIZES, **more)).save_pretrained(folder)


def save_inputs(folder: Path) -> None:
    """A base model, a reward model, conversations and preferences with the splits of the sets in their place."""
    save_model(folder / "base", LlamaForCausalLM, None)
    save_model(folder / "reward", LlamaForSequenceClassification, LLAMA3, num_labels=1, initializer_range=0.2)
    turns = [
        [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
        for n in range(2 * PROMPTS)
    ]
    chats = [{"prompt": turn[0]["content"], "messages": turn} for turn in turns]
    pairs = [
        {
            "prompt": turn[0]["content"],
            "chosen": turn,
            "rejected": [turn[0], {"role": "assistant", "content": f"I do not know what {n} is."}],
        }
        for n, turn in enumerate(turns)
    ]
    for name, rows, suffix in (("chats", chats, "sft"), ("preferences", pairs, "prefs")):
        halves = {"train": rows[:PROMPTS], "test": rows[PROMPTS:]}
        DatasetDict({f"{half}_{suffix}": Dataset.from_list(some) for half, some in halves.items()}).save_to_disk(
            folder / name
        )


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """To its end, by a shell."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\n{said}"
    assert "Traceback" not in said, f"{command}\n{said}"
    return said


@contextmanager
def served(command: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of the server that a command starts, once it answers."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    more = {"TEST_PORT": str(port), "MODEL_SERVER_REQUESTS": str(folder / "requests")}
    process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=environment | more)
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            with suppress(URLError), urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                assert json.load(answer)["data"]
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def swapped(command: str, *changes: tuple[str, str]) -> str:
    """With each second word in the place of the first, which must be there once."""
    words = command.split()
    for old, new in changes:
        assert words.count(old) == 1, f"{old} in: {command}"
        words[words.index(old)] = new
    return " ".join(words)


def test_each_command_finds_what_the_one_before_wrote(shared_dir: Path, tmp_path: Path) -> None:
    save_inputs(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "vllm").write_text(
        VLLM.format(python=sys.executable, server=ROOT / "tests" / "slurm" / "model_server.py")
    )
    (programs / "vllm").chmod(0o755)
    path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), os.environ["PATH"]))
    kept = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **kept, "NEMO_LMPO_EVAL_DATA": str(shared_dir / "evaluation")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "cache")}
    tune, export, serve, pairs, stop, train, evaluate, tables = commands()

    said = run(
        f"{tune} {SMALL} model.restore_from_path=base data.train.path=chats data.validation.path=chats",
        tmp_path,
        environment,
    )
    assert f"done: {STEPS} steps; checkpoints in runs/sft/checkpoints" in said
    run(export, tmp_path, environment)
    tuned, base = (load_file(tmp_path / name / "model.safetensors") for name in ("sft_hf", "base"))
    assert tuned.keys() == base.keys()
    assert any(not tuned[name].float().equal(tensor.float()) for name, tensor in base.items())

    assert (serve[-2:], stop) == (" &", "kill $!"), "the server runs beside the pairs alone"
    with served(serve[:-2], tmp_path, environment) as address:
        small = f"--limit {PROMPTS} --samples {SAMPLES} --max-new-tokens 150 --quiet"
        changes = (("HuggingFaceH4/ultrafeedback_binarized", "preferences"), (SERVED, address), ("RM", "reward"))
        run(f"{swapped(pairs, *changes)} {small}", tmp_path, environment)
    made = [json.loads(line) for line in (tmp_path / "pairs" / "sft" / "pairs.jsonl").read_text().splitlines()]
    assert len(made) >= STEPS * BATCH
    assert all(row["chosen"] != row["rejected"] for row in made)

    said = run(f"{train} {SMALL} data.validation.path=preferences", tmp_path, environment)
    assert f"done: {STEPS} steps; checkpoints in runs/lmpo/checkpoints" in said
    assert f"{len(made)} rows, {len(made)} usable" in said
    assert len([line for line in metrics_of(tmp_path / "runs" / "lmpo") if "loss" in line]) == STEPS

    with serving() as judge:
        small = f"--limit {INSTRUCTIONS} --max-new-tokens 8 --bootstrap 20 --retries 1 --quiet"
        run(f"{swapped(evaluate, ('https://HOST/v1', judge.url), ('NAME', MODEL))} {small}", tmp_path, environment)
        assert judge.count("/v1/chat/completions") == INSTRUCTIONS
    found = json.loads((tmp_path / "evals" / "lmpo" / "alpaca_eval" / "result.json").read_text())
    assert (found["n"], found["model"]["setting"], found["model"]["method"]) == (INSTRUCTIONS, "llama3_8b_base", "LMPO")
    check_wins(found, tmp_path / "evals" / "lmpo")

    run(tables, tmp_path, environment)
    page = (tmp_path / "evals" / "tables.md").read_text()
    assert f"{found['values']['wr']['value']:.1f}" in page
    assert (tmp_path / "evals" / "tables.html").is_file()

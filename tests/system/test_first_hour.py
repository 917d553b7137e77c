"""A new user's first hour: README.md and docs/quickstart.md from an installed wheel, in a directory of one's own.

Every step is the console script in a process of its own; its exit status and its last line are given here, so a step
whose last line changes fails. Commands marked `documented` must stand in one of the two pages, letter for letter.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "docs/quickstart.md"))
STEPS = 60
SETTINGS = (
    *("data.train.path=pairs.jsonl", "data.on_bad_row=skip", "data.validation.limit=10", "model.global_batch_size=12"),
    *("model.architecture.hidden_size=64", "model.architecture.intermediate_size=128"),
    *("model.architecture.num_hidden_layers=2", "optim.lr=3e-3", f"trainer.max_steps={STEPS}"),
)
TRAIN = shlex.join(("nemo-lmpo", "train", "lmpo_tiny", *SETTINGS))
PROMPTS = ("sort d a c", "sort z b e", "sort q r p")
TIMES = {"time", "step_seconds", "pairs_per_second", "tokens_per_second", "memory/peak"}
TIMES |= {f"checkpoint/{name}" for name in ("seconds", "share", "write_seconds", "gb_per_second")}
"""Metrics that differ from run to run."""


@dataclass
class User:
    """Somebody with the wheel in a virtual environment."""

    home: Path
    programs: Path

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command, at a console of 80 columns; both outputs go to one pipe."""
        # Not PYTHONPATH, which would bring the checkout back.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NEMO_LMPO"))}
        environment = {
            **kept,
            **{"PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80", "OMP_NUM_THREADS": "1"},
            "XDG_CACHE_HOME": str(self.home.parent / "cache"),
        }
        program, *arguments = shlex.split(command)
        return subprocess.Popen(
            [self.programs / program, *arguments],
            cwd=self.home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def step(self, command: str, last: str, status: int = 0, *, documented: bool = False) -> str:
        """Run a command to its end; ``last`` is a regular expression of its whole last line. Returns what it said."""
        assert not documented or command in PAGES, f"neither page has this command any more: {command}"
        return self.end(self.start(command), last, status)

    def end(self, process: subprocess.Popen[str], last: str, status: int = 0) -> str:
        """Wait for the end of a command, and compare."""
        said, _ = process.communicate(timeout=300)
        assert process.returncode == status, said
        assert re.fullmatch(last, (said.splitlines() or [""])[-1]), said
        assert not re.search(r"Traceback|Warning|warnings\.warn|site-packages", said), f"noise:\n{said}"
        return said


def write_pairs(path: Path) -> None:
    """Pairs as people have them, in words that the tiny tokenizer knows: odd columns, and two unusable rows."""
    rng = random.Random(1)
    rows: list[dict[str, Any]] = []
    for number in range(60):
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 6))
        right, wrong = " ".join(sorted(letters)), " ".join(sorted(letters, reverse=True))
        row = {"id": number, "prompt": f"sort {' '.join(letters)}", "chosen": right, "rejected": f"{wrong} well so"}
        rows.append({**row, "score_chosen": 9.5, "score_rejected": 2, "source": "own"})
    rows[3]["system"] = "very sure"
    rows[4]["history"] = [["sort b a", "a b"]]
    rows[5]["chosen"] = rows[5]["chosen"].replace(" ", "\u2028", 1)  # not the end of a line, here as in JSON
    rows[6]["rejected"] = rows[6]["chosen"]
    rows[7]["chosen"] = ""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    """The wheel, built and installed without a network; its dependencies are those of this environment."""
    pytest.importorskip("hatchling", reason="builds the wheel; pip install -e '.[test]'")
    place = tmp_path_factory.mktemp("first_hour")
    quiet: dict[str, Any] = {"check": True, "capture_output": True, "text": True}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(place / "dist"), str(ROOT)]
    subprocess.run([*pip, *build], **quiet)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], **quiet)
    python = place / "venv" / "bin" / "python"
    (wheel,) = (place / "dist").glob("nemo_lmpo-*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], **quiet)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    # Only as a path: the line that brings an editable checkout is not read there.
    (packages / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    home = place / "home"
    home.mkdir()
    write_pairs(home / "pairs.jsonl")
    (home / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return User(home, python.parent)


@pytest.fixture(scope="module")
def run(user: User) -> Path:
    """A run that is interrupted and resumed."""
    assert "\nnemo-lmpo train lmpo_tiny\n" in PAGES
    metrics = user.home / "runs" / "lmpo_tiny" / "metrics.jsonl"
    process = user.start(TRAIN)
    try:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = user.end(process, r"stopped by SIGINT after step \d+, saved; run the same command to resume")
    finally:
        process.kill()
    step = int(re.findall(r"after step (\d+)", said)[-1])
    assert step < STEPS
    banner = said[said.index("-----") : said.index("train: ")].splitlines()
    assert max(map(len, banner)) <= 80, "the banner fits a console"
    assert "  pairs.jsonl: 60 rows, 58 usable" in said
    assert "  dropped: 1 chosen equals rejected, 1 empty response\n" in said
    assert "  columns that nothing uses: score_chosen, score_rejected, source\n" in said
    said = user.step(TRAIN, rf"done: {STEPS} steps; checkpoints in runs/lmpo_tiny/checkpoints")
    assert f"resumed after step {step}\n" in said
    return metrics.parent


@pytest.fixture(scope="module")
def exported(user: User, run: Path) -> Path:
    """Its export."""
    user.step("nemo-lmpo export runs/lmpo_tiny", r"exported: runs/lmpo_tiny/huggingface", documented=True)
    return run / "huggingface"


def test_the_command_is_there(user: User) -> None:
    user.step("nemo-lmpo --version", r"nemo-lmpo \d+\.\d+\.\d+\S*")
    said = user.step(
        "nemo-lmpo --help", r'Completion in bash: eval "\$\(register-python-argcomplete nemo-lmpo\)"', documented=True
    )
    assert "  train     train a policy on preference pairs\n" in said


@pytest.mark.parametrize(
    ("command", "status", "last"),
    [
        ("nemo-lmpo trian lmpo_tiny", 2, r"error: nemo-lmpo has no command 'trian'; did you mean train\?"),
        (
            "nemo-lmpo train lmpo_tiny optim.learning_rate=1",
            1,
            r"error: unknown key optim\.learning_rate; did you mean optim\.lr\?",
        ),
        ("nemo-lmpo train lmpo_tinny", 1, r"error: lmpo_tinny is not a recipe; did you mean lmpo_tiny\?"),
        ("nemo-lmpo train mine", 1, r"error: mine is not a recipe; `nemo-lmpo train --list` shows the recipes"),
    ],
)
def test_a_typo_is_one_sentence(command: str, status: int, last: str, user: User) -> None:
    said = user.step(command, last, status)
    assert len(said.splitlines()) <= 2, said
    assert not (user.home / "runs" / "mine").exists()


def test_check_says_what_is_used(user: User) -> None:
    check = TRAIN.replace("train", "check", 1)
    strict = check.replace(" data.on_bad_row=skip", "")
    user.step(
        strict,
        r"error: pairs\.jsonl line 7: the chosen and the rejected response are equal; correct the row, or set "
        r"data\.on_bad_row=skip to leave such rows out",
        1,
    )
    said = user.step(check, r"The configuration is valid\. Nothing was started\.")
    assert (
        "  pairs.jsonl: of the first 16 rows\n"
        "     1  unusable: chosen equals rejected\n"
        "     1  unusable: empty response\n"
        "    columns that nothing uses: score_chosen, score_rejected, source\n"
    ) in said


def test_an_interrupted_run_is_that_of_one_go(user: User, run: Path) -> None:
    user.step(
        f"{TRAIN} run_dir=whole logging.report=false logging.tensorboard=false",
        rf"done: {STEPS} steps; checkpoints in whole/checkpoints",
    )
    whole, parts = (
        [{name: value for name, value in line.items() if name not in TIMES} for line in read(path / "metrics.jsonl")]
        for path in (user.home / "whole", run)
    )
    assert [line for line in parts if "loss" in line] == [line for line in whole if "loss" in line]
    assert len([line for line in parts if "loss" in line]) == STEPS
    assert parts[-1] == whole[-1], "the last validation"


def test_the_report(user: User, run: Path) -> None:
    user.step("nemo-lmpo report runs/lmpo_tiny", r"runs/lmpo_tiny/report\.html", documented=True)
    assert (run / "report.html").is_file()


def test_transformers_answers_as_generate(user: User, exported: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    user.step(
        "nemo-lmpo generate --model runs/lmpo_tiny --prompts prompts.jsonl --output answers.jsonl",
        r"wrote answers\.jsonl: 3 answers",
        documented=True,
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    for prompt, answer in zip(PROMPTS, read(user.home / "answers.jsonl"), strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        start = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, do_sample=False, max_length=128)[0, start:]
        assert (answer["prompt"], answer["tokens"]) == (prompt, len(ids))
        # One token per word: text, number and end say which ids they were.
        assert answer["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert answer["finished"] == (ids[-1] == tokenizer.eos_token_id)
        assert answer["response"].strip(), "an answer without words shows nothing"


def test_conversion_there_and_back(user: User, run: Path) -> None:
    user.step("nemo-lmpo convert nemo-to-hf --model runs/lmpo_tiny --output hf", "wrote hf")
    user.step("nemo-lmpo convert hf-to-nemo --model hf --output back.nemo", r"wrote back\.nemo")
    user.step("nemo-lmpo convert verify --hf hf --nemo back.nemo", r"passed: tolerance 0\.0001")

"""The scripts of `examples/` run to their end on small shapes, with what they promise at the end."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = (
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "data.validation.limit=8", "model.global_batch_size=8"),
    *("model.architecture.num_hidden_layers=2", "logging.tensorboard=false"),
)

COUNT = "def count(prompt, answers):\n    return [float(len(one)) for one in answers]\n"


def tell(story: str, folder: Path, *settings: str, **variables: str) -> str:
    """Run a script in a folder; returns what it printed."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("NEMO_LMPO_", "SLURM_", "SBATCH_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    done = subprocess.run(
        [EXAMPLES / f"{story}.sh", *settings],
        cwd=folder,
        env={**kept, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_script_is_told_and_tested() -> None:
    named = {path.stem for path in EXAMPLES.glob("*.sh")}
    text = Path(__file__).read_text()
    page = (EXAMPLES / "README.md").read_text()
    for name in named:
        assert f'"{name}"' in text, name
        assert f"({name}.sh)" in page, name
    assert len(named) == page.count(".sh`](")


@pytest.fixture(scope="module")
def own_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own_pairs")
    pair = {"prompt": "sort d a c", "chosen": "a c d", "rejected": "d c a indeed"}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(16)))
    (folder / "prompts.jsonl").write_text('{"prompt": "sort b a"}\n')
    variables = {"RECIPE": "lmpo_tiny", "MODEL": "", "PAIRS": "pairs.jsonl", "PROMPTS": "prompts.jsonl"}
    tell("own_pairs", folder, *SMALL, **variables)
    return folder / "own_pairs"


def test_own_pairs_become_a_model_that_answers(own_pairs: Path) -> None:
    assert (own_pairs / "run" / "report.html").is_file()
    assert (own_pairs / "model" / "model.safetensors").is_file()
    [answer] = (own_pairs / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer)["prompt"] == "sort b a"


def test_adapters_for_one_device(own_pairs: Path, tmp_path: Path) -> None:
    variables = {"RECIPE": "lmpo_tiny", "MODEL": str(own_pairs / "model")}
    tell("lora_one_gpu", tmp_path, *SMALL, **variables)
    adapter = json.loads((tmp_path / "lora_one_gpu" / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 16
    assert adapter["base_model_name_or_path"] == str(own_pairs / "model")
    assert (tmp_path / "lora_one_gpu" / "merged" / "README.md").is_file()


def test_losses_on_one_page(tmp_path: Path) -> None:
    tell("compare_losses", tmp_path, *SMALL, SETTING="tiny", SEEDS="1")
    page = (tmp_path / "compare_losses" / "comparison" / "comparison.md").read_text()
    assert "## Differences from simpo" in page.replace("\\", "")
    assert "undecided" in page  # with one seed


def test_two_nodes_are_submitted(tmp_path: Path) -> None:
    """What sbatch would get. The same line runs on a local Slurm in `tests/slurm`."""
    said = tell("two_nodes", tmp_path, *SMALL, RECIPE="lmpo_tiny", GPUS="1", SUBMIT="--print")
    [line] = [line for line in said.splitlines() if line.startswith("sbatch ")]
    assert "--nodes=2 --gpus-per-node=1" in line
    assert "train_multinode.sbatch lmpo_tiny" in line
    assert "trainer.max_steps=2" in line


def test_a_format_is_counted() -> None:
    bullet_points = runpy.run_path(str(EXAMPLES / "bullet_points.py"))["bullet_points"]
    kept = ["- a\n- b\n- c", "* a\n\n\u2022 b\n  - c\n"]
    half = ["- a\n- b", "a\nb\nc", "Here:\n- b\n- c"]
    none = ["", "a, b, c", "Three:\n- a\n- b\n- c", "-a\n-b"]
    assert bullet_points("List 3 things.", kept + half + none) == [1.0] * 2 + [0.5] * 3 + [0.0] * 4


def test_follow_a_format(own_pairs: Path, tmp_path: Path) -> None:
    """The reward is the test's own, as in the story below; the mean of the script's own is printed for both models."""
    (tmp_path / "lengths.py").write_text(COUNT)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    said = tell(
        "follow_a_format",
        tmp_path,
        *SMALL,
        "model.global_batch_size=2",
        PYTHONPATH=path,
        RECIPE="lmpo_tiny",
        MODEL=str(own_pairs / "model"),
        SAMPLES="3",
        SAMPLING="--limit 24 --max-new-tokens 24 --quiet",
        REWARD="lengths:count",
    )
    work = tmp_path / "follow_a_format"
    for name in ("model", "run"):
        answers = [json.loads(line) for line in (work / f"answers_{name}.jsonl").read_text().splitlines()]
        assert len(answers) == 48
        assert f"answers_{name}.jsonl: mean reward 0.000; 0 of 48 as asked for" in said


def test_pairs_of_its_own(tmp_path: Path) -> None:
    """A function of the test is the reward: it tells all answers apart, so that small samples make pairs."""
    (tmp_path / "lengths.py").write_text(COUNT)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    variables = {"SAMPLES": "3", "SAMPLING": "--limit 24 --max-new-tokens 24 --quiet", "REWARD": "lengths:count"}
    tell("pairs_of_its_own", tmp_path, *SMALL, "model.global_batch_size=2", PYTHONPATH=path, **variables)
    work = tmp_path / "pairs_of_its_own"
    pairs = [json.loads(line) for line in (work / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) >= 2
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert (work / "lmpo" / "report.html").is_file()

"""Rounds as a chain of jobs on a real Slurm, the model served by transformers: a failed round stops the chain."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import slurm
from tests.slurm.local_slurm import LocalSlurm
from tests.slurm.stories import ROOT, SLURM
from tests.system.rounds_runs import STEPS, TRAINING, num_lines, save_inputs

__all__ = ["slurm"]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

PATIENCE, PROMPTS, SAMPLES = 1200.0, 16, 3
GOOD = "def short(prompt, answers):\n    return [-float(len(answer.split())) for answer in answers]\n"
BAD = "def short(prompt, answers):\n    raise ValueError('no such card')\n"


class Chain:
    """Two rounds: a job for the pairs and one for the training of each, as docs/pairs.md submits them."""

    def __init__(self, cluster: LocalSlurm, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        save_inputs(folder)

    def submit(self) -> list[str]:
        """All four jobs; their numbers."""
        model = str(self.folder / "policy")
        jobs: list[str] = []
        for number in (1, 2):
            pairs, run = f"rounds/pairs_{number}", f"rounds/run_{number}"
            asked = ("--limit", str(PROMPTS), "--samples", str(SAMPLES), "--max-new-tokens", "60", "--quiet")
            where = ("--model", model, "--output", pairs, "--prompts", "builtin:tiny", "--reward", "reward.py:short")
            jobs.append(self._sbatch(jobs, "pairs.sbatch", *where, *asked))
            settings = (f"model.restore_from_path={model}", f"data.train.path={pairs}", f"run_dir={run}")
            jobs.append(self._sbatch(jobs, "train.sbatch", "lmpo_tiny", *TRAINING, *settings))
            model = run
        return jobs

    def _sbatch(self, before: list[str], template: str, *arguments: str) -> str:
        options = ["--parsable", "--gpus-per-node=1", "--ntasks-per-node=1", "--nodelist=node1"]
        if before:
            options += [f"--dependency=afterok:{before[-1]}", "--kill-on-invalid-dep=yes"]
        variables: dict[str, Any] = {
            "NEMO_LMPO_PYTHON": sys.executable,
            "NEMO_LMPO_SLURM_DIR": str(SLURM),
            "NEMO_LMPO_SERVE": f"{sys.executable} {ROOT}/tests/slurm/model_server.py",
            "MODEL_SERVER_REQUESTS": str(self.folder / "requests"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = ("sbatch", *options, str(SLURM / template), *arguments)
        return self.cluster.run(*command, cwd=self.folder, **variables).strip()

    def ends(self, jobs: list[str]) -> list[str]:
        """How each ended."""
        return [self.cluster.wait_until_ended(job, PATIENCE)["JobState"] for job in jobs]

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}.log"))


def weights_sha256(pairs: Path) -> str:
    return str(json.loads((pairs / "pairs.json").read_text())["models"][0]["weights_sha256"])


def test_a_failed_round_stops_the_chain_and_the_same_lines_go_on(slurm: LocalSlurm, tmp_path: Path) -> None:
    chain = Chain(slurm, tmp_path)
    (tmp_path / "reward.py").write_text(BAD)
    jobs = chain.submit()
    assert chain.ends(jobs) == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"], chain.log(jobs[0])
    said = chain.log(jobs[0])
    assert "error: --reward reward.py:short fails on prompt" in said
    assert "scoring failed; see above, and submit the same line again to resume" in said
    assert not (tmp_path / "rounds" / "run_1").exists()
    samples = tmp_path / "rounds" / "pairs_1" / "work" / "samples.jsonl"
    sampled = samples.read_bytes()
    assert num_lines(samples) == PROMPTS * SAMPLES
    asked = (tmp_path / "requests").read_text().splitlines()

    (tmp_path / "reward.py").write_text(GOOD)
    jobs = chain.submit()
    assert chain.ends(jobs) == ["COMPLETED"] * 4, "\n".join(map(chain.log, jobs))[-5000:]
    assert samples.read_bytes() == sampled
    again = (tmp_path / "requests").read_text().splitlines()[len(asked) :]
    full = [line for line in again if json.loads(line)[2] > 1]  # requests of one token look at the server itself
    assert len(full) == PROMPTS * SAMPLES  # of the second round alone
    for number in (1, 2):
        rows = (tmp_path / "rounds" / f"pairs_{number}" / "pairs.jsonl").read_text().splitlines()
        assert len(rows) >= 4
        steps = [
            json.loads(line) for line in (tmp_path / f"rounds/run_{number}/metrics.jsonl").read_text().splitlines()
        ]
        assert max(line["step"] for line in steps) == STEPS
    assert weights_sha256(tmp_path / "rounds" / "pairs_1") != weights_sha256(tmp_path / "rounds" / "pairs_2")
    assert "server: ready" in chain.log(jobs[2])

    # What is done is passed over: no server, no request, the same files.
    before = {path: path.read_bytes() for path in (tmp_path / "rounds").glob("pairs_*/pairs.json*")}
    jobs = chain.submit()
    assert chain.ends(jobs) == ["COMPLETED"] * 4, "\n".join(map(chain.log, jobs))[-5000:]
    assert "server" not in chain.log(jobs[0])
    assert len((tmp_path / "requests").read_text().splitlines()) == len(asked) + len(again)
    assert {path: path.read_bytes() for path in (tmp_path / "rounds").glob("pairs_*/pairs.json*")} == before

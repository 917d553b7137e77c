"""pairs.sbatch's shell part: the server is there for the samples, and gone when the GPUs are the reward model's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.system import test_slurm_scripts
from tests.system.test_slurm_scripts import Job

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *words):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose steps note what they are asked for and whether the server answers."""
    (tmp_path / "server.py").write_text(HEALTHY)
    script = f"""case "$*" in
    *evaluate*export*) echo /models/served ;;
    *nemo_lmpo.pairs*)
        port=$(printf "%s" "$*" | sed -n 's/.*127.0.0.1:\\([0-9]*\\).*/\\1/p')
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && up=up || up=gone
        echo "$up $*" >>"$TEST_FOLDER/asked"
        case "$*" in *"--until sample"*) exit "${{TEST_SAMPLE:-0}}" ;; esac ;;
    *serve*) exec {sys.executable} "$TEST_FOLDER/server.py" "${{*: -1}}" ;;
    esac"""
    monkeypatch.setitem(test_slurm_scripts.STAND_INS, "srun", script)
    return Job(tmp_path)


OPTIONS = ("--output", "pairs/mine", "--prompts", "x y.jsonl", "--reward-model", "rm")


def run(job: Job, *options: str, status: int = 0, **more: str) -> str:
    return job.run("run_pairs", *options, status=status, SLURM_JOB_NUM_NODES="1", **more)


def test_the_server_is_gone_when_answers_are_scored(job: Job) -> None:
    said = run(job, "--model", "runs/a", *OPTIONS)
    assert said.splitlines()[-1] == "slurm: the pairs are done"
    sampled, scored = (job.folder / "asked").read_text().splitlines()
    assert sampled.startswith("up ")
    assert sampled.endswith("--until sample")
    assert scored.startswith("gone ")
    assert "--until" not in scored
    for line in (sampled, scored):
        assert "-m nemo_lmpo.pairs --model runs/a --endpoint http://127.0.0.1:" in line
        assert "--served-name /models/served --output pairs/mine --prompts x y.jsonl --reward-model rm" in line


def test_nothing_is_served_where_the_pairs_are_there(job: Job) -> None:
    (job.folder / "pairs" / "mine").mkdir(parents=True)
    (job.folder / "pairs" / "mine" / "pairs.json").touch()
    said = run(job, "--model", "runs/a", *OPTIONS)
    assert "server" not in said
    assert said.splitlines()[-1] == "slurm: the pairs are done"
    (asked,) = (job.folder / "asked").read_text().splitlines()
    assert asked.startswith("gone ")
    assert "--until" not in asked


def test_what_fails_can_be_submitted_again(job: Job) -> None:
    said = run(job, "--model=runs/a", *OPTIONS, status=1, TEST_SAMPLE="3")
    assert "sampling failed; see above, and submit the same line again to resume" in said
    assert len((job.folder / "asked").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (OPTIONS, "give --model"),
        (("--model", "a", "--model", "b"), "give one --model a job"),
        (("--model", "a", "--endpoint", "http://x"), "--endpoint is the job's own; leave it out"),
        (("--model", "a", "--until", "sample"), "--until is the job's own; leave it out"),
        (("--model", "a", "--prompts", "x"), "give --output"),
    ],
)
def test_what_a_job_cannot_do(job: Job, options: tuple[str, ...], said: str) -> None:
    assert said in run(job, *options, status=1)

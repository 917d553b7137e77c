"""Texts from outside on their way through the templates: none is run by a shell, and no key comes out in a log."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.slurm.__main__ import main
from nemo_lmpo.slurm.cluster import read_settings
from nemo_lmpo.slurm.submit import Submission, sbatch_command
from tests.system.test_slurm_scripts import SLURM, Job

TEXTS = [
    *("a b", "it's", 'say "x"', "$(touch ran)", "`touch ran`", "a;touch ran", "a&&touch ran", "|touch ran", ">ran"),
    *("*", "?", "~", "$HOME", "${HOME}", "a\nb", "a\\b", "\\", "é", "a[$(touch ran)]", "!!", "-n", "--help"),
    *("{a}", "#x", "'"),
]
KEY = "canary5f2c"


def assert_nothing_ran(folder: Path) -> None:
    assert not list(folder.rglob("ran"))


def asked(job: Job) -> list[str]:
    """The arguments that srun got, whole, though some have line breaks."""
    return (job.folder / "arguments").read_text().split("\0")[:-1]


@pytest.fixture
def whole_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.system import test_slurm_scripts

    script = 'printf "%s\\0" "$@" >"$TEST_FOLDER/arguments"\n' + test_slurm_scripts.STAND_INS["srun"]
    monkeypatch.setitem(test_slurm_scripts.STAND_INS, "srun", script)


@pytest.mark.usefixtures("whole_arguments")
def test_settings_recipes_and_folders_are_not_run(tmp_path: Path) -> None:
    """All texts at once as settings of one run; every second as the name of a recipe and of the folder of a job."""
    (tmp_path / "settings").mkdir()
    job = Job(tmp_path / "settings")
    settings = [f"data.x={text}" for text in TEXTS]
    job.run("run_training", "lmpo_tiny", *settings)
    assert asked(job)[-len(settings) :] == settings
    for number, text in enumerate(TEXTS[::2]):
        folder = tmp_path / f"{number} {text}"
        folder.mkdir()
        job = Job(folder)
        said = job.run("run_training", text)
        assert asked(job)[-1] == text
        assert said.splitlines()[-1] == "slurm: all steps are done"
        assert (folder / "runs" / "slurm" / "7" / "started").is_file()
    assert_nothing_ran(tmp_path)


@pytest.mark.usefixtures("whole_arguments")
def test_a_sweeps_values_are_not_run(tmp_path: Path) -> None:
    job = Job(tmp_path)
    texts = [text for text in TEXTS if not set(text) & set("[]\"'{}\n")] + ["../../..", "/etc"]
    for index in (0, len(texts) - 1):
        job.run("run_sweep", "lmpo_tiny", f"data.x={','.join(texts)}", SLURM_ARRAY_TASK_ID=str(index))
        run_dir, setting = asked(job)[-2:]
        assert setting == f"data.x={texts[index]}"
        assert Submission("r", (f"data.x={','.join(texts)}",)).combinations()[index] == [setting]
        assert run_dir.startswith("run_dir=runs/lmpo_tiny_sweep/data.x-")
        assert run_dir.count("/") == 2
    assert_nothing_ran(tmp_path)


@pytest.mark.parametrize("values", ["1,,2", "1,", ",1", "1\n,2"])
def test_values_that_a_sweep_would_lose_are_refused_on_both_sides(values: str, tmp_path: Path) -> None:
    said = Job(tmp_path).run("run_sweep", "lmpo_tiny", f"data.x={values}", status=1, SLURM_ARRAY_TASK_ID="0")
    message = "data.x has an empty value or a line break among its values"
    assert message in said
    with pytest.raises(ConfigError, match=message):
        Submission("lmpo_tiny", (f"data.x={values}",))


def test_an_index_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """Bash computes with texts, too, and runs what stands in them."""
    job = Job(tmp_path)
    for index in ("a[$(touch ran)]", "x", "-1"):
        assert "submit it with --array" in job.run("run_sweep", "r", status=1, SLURM_ARRAY_TASK_ID=index)
    assert_nothing_ran(tmp_path)


def test_the_printed_line_runs_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >{shlex.quote(str(tmp_path))}/arguments\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    settings = [f"data.x={text}" for text in TEXTS if "," not in text]
    arguments = ["lmpo_tiny", "--config-dir", "my $(touch ran) recipes", *settings, "--no-validate", "--print"]
    assert main(["submit", *arguments]) == 0
    subprocess.run(["bash", "-c", capsys.readouterr().out.removeprefix("Not validated.\n")], check=True)
    expected = sbatch_command(
        Submission("lmpo_tiny", tuple(settings), config_dir=Path("my $(touch ran) recipes")), SLURM, {}
    )
    assert (tmp_path / "arguments").read_text().split("\0")[:-1] == expected[1:]
    assert_nothing_ran(tmp_path)


SECRETS = {
    "OPENAI_API_KEY": KEY,
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": KEY,
    "MLFLOW_TRACKING_URI": f"https://me:{KEY}@host",
    "NEMO_LMPO_SERVE": f"false --api-key {KEY}",
    "NEMO_LMPO_SERVE_SECONDS": "1",
}
JUDGE = ("--judge-endpoint", f"https://me:{KEY}@host/v1", "--judge", "name")


@pytest.mark.parametrize(
    ("command", "settings", "status", "variables"),
    [
        (("run_training", "r"), f"export TOKEN={KEY}\n", 0, {}),
        (("run_training", "r"), f"export TOKEN={KEY}\n", 1, {"TEST_OUTCOME": "refused", "TEST_STATUS": "1"}),
        (("run_training", "r"), f"export TOKEN={KEY}\n", 0, {"TEST_OUTCOME": "stopped SIGUSR1"}),
        (("run_training", "r"), "", 1, {"NEMO_LMPO_SETUP": f"export TOKEN={KEY}; false"}),
        (("run_training", "r"), "", 1, {"NEMO_LMPO_SETUP": f"export TOKEN={KEY}("}),
        (("run_training", "r"), "", 1, {"NEMO_LMPO_SETUP": f"TOKEN= {KEY}"}),
        (("run_training", "r"), f"export TOKEN= {KEY}-x\nfalse\n", 1, {}),  # a blank too many
        (("run_training", "r"), f"TOKEN= {KEY}\n", 1, {}),
        (("run_training", "r"), f"export TOKEN=({KEY}\n", 1, {}),
        (("run_training", "r"), f"if {KEY}; then {KEY})\n", 1, {}),
        (("run_command", "nemo_lmpo.generate"), f"export TOKEN={KEY}\n", 0, {}),
        (("run_command", "nemo_lmpo.generate"), f"export TOKEN={KEY}\n", 1, {"TEST_STATUS": "1"}),
        (("run_evaluation", "arena_hard", "--model", "m", *JUDGE), f"export TOKEN={KEY}\n", 1, {}),
        (("run_evaluation", "arena_hard", *JUDGE), f"export TOKEN={KEY}\n", 1, {}),
    ],
)
def test_no_key_is_in_what_a_job_leaves(
    command: tuple[str, ...], settings: str, status: int, variables: dict[str, str], tmp_path: Path
) -> None:
    """Keys come from the environment, cluster.env and addresses; a job leaves its log and its folder."""
    job = Job(tmp_path)
    job.settings(settings)
    said = job.run(*command, status=status, **{**SECRETS, "SLURM_JOB_NUM_NODES": "1", **variables})
    assert said
    assert KEY not in said
    for path in (tmp_path / "runs").rglob("*") if (tmp_path / "runs").exists() else ():
        assert KEY not in path.name
        assert path.is_dir() or KEY not in path.read_text()


@pytest.mark.parametrize("line", [f"export TOKEN=({KEY}", f"if {KEY}; then {KEY})", f"TOKEN= {KEY}"])
def test_nor_in_what_submit_says_of_the_settings(line: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.env"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"cluster.env cannot be read \(error in line \d\)") as caught:
        read_settings(path)
    assert KEY not in str(caught.value)

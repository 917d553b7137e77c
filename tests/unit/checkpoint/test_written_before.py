"""Runs, archives and evaluations of earlier versions (see the READMEs of the assets) are still read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_lmpo import training
from nemo_lmpo.checkpoint.manifest import find_damage
from nemo_lmpo.checkpoint.same_run import flatten
from nemo_lmpo.config.recipe import config_as_dict, load_recipe
from nemo_lmpo.config.schema import Config
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.training_runs import metrics_of

ASSETS = Path(__file__).parents[2] / "assets"
OLDEST = "written_by_a3f51bc"


@pytest.fixture(params=[OLDEST, "written_by_06fd530"])
def asset(request: pytest.FixtureRequest) -> Path:
    return ASSETS / str(request.param)


@pytest.fixture
def run(asset: Path, tmp_path: Path) -> Path:
    shutil.copytree(asset / "run", tmp_path / "run")
    return tmp_path / "run"


def same_settings(run: Path) -> Config:
    """The run's settings as its user would give them now: what it had, and defaults for what came later."""
    known = {key for key, _ in flatten(config_as_dict(load_recipe("lmpo_tiny")))}
    # Its default was below that of `step_timeout`, which is refused by now, with the value to give.
    known.remove("trainer.distributed_timeout")
    before = dict(flatten(yaml.safe_load((run / "config.yaml").read_text())))
    overrides = [f"{key}={_quoted(value)}" for key, value in before.items() if key in known and key != "run_dir"]
    return load_recipe("lmpo_tiny", [*overrides, f"run_dir={run}"])


def _quoted(value: Any) -> str:
    return "null" if value is None else f"'{value}'" if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("asset", [OLDEST], indirect=True)
def test_its_checkpoints_are_whole_and_damage_is_noticed_without_checksums(run: Path) -> None:
    directory = run / "checkpoints" / "step_0000002"
    assert find_damage(directory) is None
    data = directory / "state" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "state/__0_0.distcp is damaged at byte" in (find_damage(directory) or "")


def test_its_run_resumes_as_it_went_on_then(run: Path, asset: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step_0000004")
    config = same_settings(run)
    assert training.run(config, LaunchInfo()).step == 4
    found, expected = metrics_of(run), metrics_of(asset / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert found[-1]["step"] == 4
    for line, wanted in zip(found, expected, strict=True):
        for name in line.keys() & wanted.keys():
            # The same code on the same processor gives the same bits; other processors sum in another order.
            # Margins near 0 are differences of float32 rewards near 8, whose last digit is worth 1e-6.
            assert line[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), (line["step"], name)
        assert wanted.keys() <= line.keys()


def test_its_run_and_its_archive_answer_alike(run: Path, asset: Path, tmp_path: Path) -> None:
    from nemo_lmpo.generate.__main__ import main

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "sort c a b"}\n{"prompt": "sort b a"}\n')
    answers = {}
    for name, model in (("run", run), ("archive", asset / "policy.nemo")):
        output = tmp_path / f"{name}.jsonl"
        command = ["--checkpoint", str(model), "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(output)]
        assert main([*command, "--max-new-tokens", "8", "--device", "cpu", "--quiet"]) == 0
        answers[name] = output.read_text()
    assert answers["run"] == answers["archive"]


def test_its_run_and_its_archive_convert_alike(run: Path, asset: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from nemo_lmpo.convert.command import nemo_to_hf

    for name, model in (("run", run / "checkpoints" / "step_0000004"), ("archive", asset / "policy.nemo")):
        assert nemo_to_hf(["--input", str(model), "--output", str(tmp_path / f"{name}_hf")]) == 0
    found, expected = (load_file(tmp_path / f"{name}_hf" / "model.safetensors") for name in ("archive", "run"))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_its_evaluation_is_shown_and_is_not_asked_for_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nemo_lmpo import cli
    from nemo_lmpo.answers.journal import Journal
    from nemo_lmpo.evaluate.result import read_result

    shutil.copytree(ASSETS / "written_by_06fd530" / "evaluation", tmp_path / "evals" / "tiny")
    found = read_result(tmp_path / "evals" / "tiny" / "arena_hard")
    assert (found.suite, found.n, found.values["wr"].value, found.judge and found.judge.asked) == (
        *("arena_hard", 3, 0.0),
        "stub",
    )
    page = tmp_path / "page"
    assert cli.main(["evaluate", "tables", str(tmp_path / "evals" / "tiny"), "--output", str(page)]) == 0
    assert "stub" in (page / "tables.html").read_text()
    for name, key, rows in (("answers.jsonl", "id", 3), ("judgments.jsonl", "game", 6)):
        with Journal(tmp_path / "evals" / "tiny" / "arena_hard" / name, key) as journal:
            assert len(journal.rows) == rows

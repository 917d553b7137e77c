"""What each round asks for, that it goes on where it was, and the numbers over all rounds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.pairs.options import DECIDE_NOTHING, add_options, words_of
from nemo_lmpo.rounds import drive
from nemo_lmpo.rounds.command import build_parser
from tests.unit.pairs.models import save_policy

PAIRS = (
    "--prompts",
    "builtin:tiny",
    "--reward",
    "math:fsum",
    "--samples",
    "3",
    "--seeds",
    "1",
    "2",
    "3",
    "--length-control",
)
START = "model.restore_from_path=start"


def arguments(folder: Path, *more: str, recipe: str = "dpo_tiny", start: str = START) -> list[str]:
    given = [start] if start else []
    return [*given, "--config-name", recipe, "--output", str(folder / "out"), "--rounds", "2", *PAIRS, *more]


class Stages:
    """Stands for the commands: writes what each leaves behind, and fails when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int = -1) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.fails_at = fails_at
        monkeypatch.setattr(drive, "run_command", self)
        monkeypatch.setattr(drive, "is_finished", lambda run_dir: (run_dir / "finished").exists())

    def __call__(self, name: str, words: Sequence[str], processes: int) -> None:
        if len(self.asked) == self.fails_at:
            self.fails_at = -1
            raise UserError("killed")
        self.asked.append((name, list(words)))
        if name == "train":
            load_recipe(words[1], words[2:])  # every setting must be one
            run = Path(next(word for word in words if word.startswith("run_dir=")).removeprefix("run_dir="))
            run.mkdir(parents=True, exist_ok=True)
            (run / "finished").touch()
            metrics = {
                "step": 1,
                "split": "train",
                "rewards/accuracies": 0.75,
                "logps/chosen": -1.5,
                "logps/rejected": -2.0,
            }
            (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
            return
        work = Path(words[words.index("--output") + 1]) / "work"
        work.mkdir(parents=True, exist_ok=True)
        samples = [("p/1", "a", 4, False), ("p/2", "b", 6, False), ("p/3", "a ", 4, False), ("q/1", "c", 10, True)]
        lines = [{"id": i, "output": text, "tokens": n, "truncated": cut} for i, text, n, cut in samples]
        (work / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = [{"id": "p/1", "score": 1.0}, {"id": "p/2", "score": 0.25}]
        (work / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in scores))


def run(folder: Path, *more: str, **names: str) -> None:
    drive.run_rounds(build_parser("rounds").parse_args(arguments(folder, *more, **names)))


def test_each_round_samples_from_the_newest_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    run(tmp_path)
    out = tmp_path / "out"
    assert [name for name, _ in stages.asked] == ["pairs", "train", "pairs", "train", "pairs"]
    sampled = [words[words.index("--model") + 1] for name, words in stages.asked if name == "pairs"]
    assert sampled == ["start", str(out / "round_1" / "run"), str(out / "round_2" / "run")]
    trained = [words for name, words in stages.asked if name == "train"]
    for number, start in ((1, "start"), (2, str(out / "round_1" / "run"))):
        assert f"model.restore_from_path={start}" in trained[number - 1]
        assert f"data.train.path={out / f'round_{number}' / 'pairs'}" in trained[number - 1]
    assert not any("reference_from_path" in word for word in trained[0])
    assert "model.reference_from_path=start" in trained[1]
    pairs = stages.asked[0][1]
    assert {"--length-control", "--reward", "math:fsum"} <= set(pairs)
    assert pairs[pairs.index("--seeds") + 1 :][:3] == ["1", "2", "3"]
    assert stages.asked[-1][1][-2:] == ["--until", "score"]


def test_numbers_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stages(monkeypatch)
    run(tmp_path)
    rows = json.loads((tmp_path / "out" / "rounds.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    # a, b and a again (which is scored once): (1 + 0.25 + 1) / 3; the cut answer has a length only.
    assert rows[0]["reward"] == pytest.approx(0.75)
    assert (rows[0]["tokens"], rows[0]["cut_off"]) == (6.0, 25.0)
    assert (rows[2]["accuracy"], rows[2]["logps_chosen"], rows[2]["logps_rejected"]) == (0.75, -1.5, -2.0)
    assert "accuracy" not in rows[0]
    page = (tmp_path / "out" / "rounds.html").read_text()
    assert page.count("data:image/png") == 1
    assert "Round 0 is the start model" in page


def test_the_reference_can_be_each_rounds_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    run(tmp_path, "--reference", "previous")
    assert not any("reference_from_path" in word for _, words in stages.asked for word in words)


def test_losses_without_a_reference_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    run(tmp_path, recipe="simpo_tiny")
    assert not any("reference_from_path" in word for _, words in stages.asked for word in words)


@pytest.mark.parametrize("stage", range(5))
def test_what_is_done_is_not_done_again(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch, fails_at=stage)
    with pytest.raises(UserError, match="killed"):
        run(tmp_path)
    run(tmp_path)
    trained = [words for name, words in stages.asked if name == "train"]
    assert len(trained) == 2
    assert stages.asked[-1][1][-2:] == ["--until", "score"]
    before = len(stages.asked)
    run(tmp_path)
    assert [name for name, _ in stages.asked[before:]] == ["pairs"]  # which finds everything there


def test_a_training_that_stops_early_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stages(monkeypatch)
    monkeypatch.setattr(drive, "is_finished", lambda run_dir: False)
    with pytest.raises(UserError, match="the training of round 1 ended before its last step"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("more", "names", "said"),
    [
        ((), {"start": ""}, "model.restore_from_path is not set"),
        (("data.train.path=x",), {}, "data.train.path=x is set by the rounds themselves"),
        (("run_dir=x",), {}, "run_dir=x is set by the rounds themselves"),
        (("--rounds", "0"), {}, "--rounds 0 must be at least 1"),
        (("--processes", "0"), {}, "--processes 0 must be at least 1"),
        (("--scores", "x"), {}, "name several scorers"),
    ],
)
def test_bad_input(
    more: tuple[str, ...], names: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Stages(monkeypatch)
    options, rest = build_parser("rounds").parse_known_args(arguments(tmp_path, *more, **names))
    options.overrides = [*options.overrides, *rest]
    with pytest.raises(ConfigError, match=said):
        drive.run_rounds(options)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_rounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stages(monkeypatch)
    run(tmp_path)
    with pytest.raises(ConfigError, match="holds rounds with pairs"):
        run(tmp_path, "--rule", "margin:1")
    with pytest.raises(ConfigError, match="holds rounds with start"):
        run(tmp_path, start="model.restore_from_path=other")


def test_a_training_that_cannot_start_is_told_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(monkeypatch)
    other = str(save_policy(tmp_path / "other"))
    for more, said in (
        (("data.validation.path=nowhere.jsonl",), "nowhere.jsonl does not exist"),
        (("model.global_batch_size=7", "--processes", "2"), "does not divide by the data-parallel size 2"),
        (("loss.beta=-1",), r"loss.beta=-1"),
        ((f"model.restore_from_path={other}",), "is another model than the recipe is laid out for"),
    ):
        with pytest.raises(UserError, match=said):
            run_with_overrides(tmp_path, *more)
    assert not stages.asked
    assert not (tmp_path / "out").exists()


def run_with_overrides(folder: Path, *more: str) -> None:
    options, rest = build_parser("rounds").parse_known_args(arguments(folder, *more))
    options.overrides = [*options.overrides, *rest]
    drive.run_rounds(options)


def test_a_training_is_corrected_without_sampling_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the first checkpoint is there, the recipe may change; the answers bind as soon as there are some."""
    Stages(monkeypatch, fails_at=1)
    with pytest.raises(UserError, match="killed"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="holds rounds with pairs"):
        run(tmp_path, "--temperature", "0.5")
    run_with_overrides(tmp_path, "data.row_tokens=512")
    (tmp_path / "out" / "round_1" / "run" / "checkpoints" / "step_0000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds rounds with recipe"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="holds rounds with reference"):
        run_with_overrides(tmp_path, "data.row_tokens=512", "--reference", "previous")
    run_with_overrides(tmp_path, "data.row_tokens=512")


def test_pace_and_place_of_servers_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch, fails_at=3)
    judged = ("--judge-mode", "pairwise")
    with pytest.raises(UserError, match="killed"):
        run(tmp_path, *judged)
    run(tmp_path, *judged, "--concurrency", "2", "--retries", "1", "--requests-per-minute", "9", "--quiet")
    assert {"--concurrency", "--retries", "--requests-per-minute", "--quiet"} <= set(stages.asked[-1][1])
    with pytest.raises(ConfigError, match="holds rounds with pairs"):
        run(tmp_path)


def test_what_decides_nothing_are_options() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert set(DECIDE_NOTHING) <= {action.dest for action in parser._actions}


def test_words_are_the_options_again(tmp_path: Path) -> None:
    options = build_parser("rounds").parse_args(arguments(tmp_path, "--temperature", "0.5", "--skip-bad-rows"))
    words = words_of(options)
    again = build_parser("rounds").parse_args(["--config-name", "r", "--output", "o", *words])
    for name, value in vars(options).items():
        if name not in ("config_name", "output", "rounds", "overrides"):
            assert getattr(again, name) == value, name
    assert "--retries" not in words

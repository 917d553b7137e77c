from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.report import write_report
from nemo_lmpo.report.__main__ import main
from nemo_lmpo.report.read import read_run
from nemo_lmpo.report.summary import best_step, metric_rows, settings_rows, state_text

PNG_START = b"\x89PNG\r\n\x1a\n"


def test_page_holds_every_picture_and_loads_nothing(example_page: Path) -> None:
    assert example_page.name == "report.html"
    text = example_page.read_text(encoding="utf-8")
    files = sorted((example_page.parent / "report").iterdir())
    assert {file.stem for file in files} == {
        "logps",
        "margins",
        "accuracy",
        "rewards",
        "loss",
        "perplexity",
        "margin_statistics",
        "lengths",
        "logps_sum",
        "optimization",
        "throughput",
    }
    inside = [base64.b64decode(data) for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)]
    assert sorted(inside) == sorted(file.read_bytes() for file in files)
    assert len(inside) == 11
    assert all(png.startswith(PNG_START) for png in inside)
    assert not re.search(r'(src|href|srcset)="(?!data:)', text)
    assert "<script" not in text


def test_text_of_the_page(example_page: Path) -> None:
    text = example_page.read_text(encoding="utf-8")
    assert "<title>lmpo_example: report</title>" in text
    assert "Finished: 40 of 40 steps" in text
    assert "Best is the step with the highest val/rewards/accuracies" in text
    assert "<h2>Log-probabilities of the responses</h2>" in text
    assert "newest metrics" in text


def test_what_the_user_wrote_is_escaped(example_page: Path) -> None:
    text = example_page.read_text(encoding="utf-8")
    assert "pairs &lt;one&gt; &amp; two.jsonl" in text
    assert "<one>" not in text


def test_results_by_hand(make_run: Callable[..., Path]) -> None:
    header, rows = metric_rows(read_run(make_run()))
    # A tenth of 40 steps is 4. The best accuracy, 0.9, is that of step 20.
    assert header == [
        "",
        "training, last 4 steps",
        "validation, first (step 10)",
        "validation, best (step 20)",
        "validation, last (step 40)",
    ]
    by_name = {row[0]: row[1:] for row in rows}
    # Training: mean of 2/37, 2/38, 2/39, 2/40 = 0.05199. Validation: 3/10, 3/20, 3/40.
    assert by_name["loss"] == ["0.05199", "0.3", "0.15", "0.075"]
    # Mean of 0.87, 0.88, 0.89, 0.90.
    assert by_name["accuracy"] == ["88.5 %", "50.0 %", "90.0 %", "70.0 %"]
    assert by_name["reward margin"] == ["0.385", "-", "-", "-"]


def test_best_by_the_lowest_loss_when_the_config_is_missing(make_run: Callable[..., Path]) -> None:
    assert best_step(read_run(make_run(config=None))) == (40, "lowest val/loss")


def test_columns_that_would_repeat_are_joined(make_run: Callable[..., Path]) -> None:
    header, _ = metric_rows(read_run(make_run(config=None)))
    assert header[2:] == ["validation, first (step 10)", "validation, best and last (step 40)"]
    header, _ = metric_rows(read_run(make_run(name="single", validate=(40,))))
    assert header[2:] == ["validation (step 40)"]
    run = read_run(make_run(name="none", validate=()))
    assert metric_rows(run)[0][2:] == []
    assert best_step(run) is None


def test_settings(make_run: Callable[..., Path]) -> None:
    rows = settings_rows(read_run(make_run()))
    assert rows == [
        ("loss.name", "lmpo"),
        ("loss.beta", "2"),
        ("loss.margin.kind", "power5"),
        ("model.restore_from_path", "org/model"),
        ("data.train.path", "pairs <one> & two.jsonl"),
        ("data.max_length", "2048"),
        ("model.global_batch_size", "128"),
        ("optim.lr", "6e-07"),
        ("trainer.precision", "bf16"),
        ("model.tensor_model_parallel_size", "2"),  # and no size of 1
    ]


def test_settings_of_adapters_and_experts(make_run: Callable[..., Path]) -> None:
    """Where they are on, with what belongs to them; a router that is trained is not told."""
    run = read_run(make_run())
    peft = {"name": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"]}
    off = {"moe_freeze_router": False, "expert_tensor_parallel_size": 1}
    balance = {"moe_aux_loss": "sequence", "moe_aux_loss_coefficient": 0.01, "expert_model_parallel_size": 4, **off}
    plain = settings_rows(replace(run, config={"model": {"peft": {**peft, "name": None}, **off}}))
    assert plain == []
    assert settings_rows(replace(run, config={"model": {"peft": peft, **balance}})) == [
        ("model.peft.name", "lora"),
        ("model.peft.rank", "8"),
        ("model.peft.alpha", "16"),
        ("model.peft.dropout", "0"),
        ("model.peft.target_modules", "['q_proj', 'up_proj']"),
        ("model.moe_aux_loss", "sequence"),
        ("model.moe_aux_loss_coefficient", "0.01"),
        ("model.expert_model_parallel_size", "4"),
    ]


@pytest.mark.parametrize(
    ("steps", "total", "text"),
    [
        (40, 40, ("Finished: 40 of 40 steps", "finished")),
        (12, 1478, ("Not finished: 12 of 1,478 steps", "unfinished")),
        (12, None, ("12 steps", "unknown")),
    ],
)
def test_state(make_run: Callable[..., Path], steps: int, total: int | None, text: tuple[str, str]) -> None:
    assert state_text(read_run(make_run(steps=steps, total=total, validate=()))) == text


def early_stop(**changes: Any) -> str:
    facts = {"step": 12, "monitor": "val/loss", "best": 0.25, "without_better": 3, **changes}
    return json.dumps({"total_steps": 1478, "stopped_early": facts})


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        (early_stop(), "Stopped early: 12 of 1,478 steps; no better val/loss than 0.25 in the last 3 validations"),
        (
            early_stop(best=None, without_better=1),
            "Stopped early: 12 of 1,478 steps; no better val/loss in the last 1 validation",
        ),
        # It went on, and was killed: what stands there is of before.
        (early_stop(step=8), "Not finished: 12 of 1,478 steps"),
        (
            json.dumps({"total_steps": 1478, "stopped_early": {"of": "a later version"}}),
            "Not finished: 12 of 1,478 steps",
        ),
        ("[1478]", "12 steps"),
    ],
)
def test_state_of_a_run_that_stopped_early(make_run: Callable[..., Path], facts: str, text: str) -> None:
    run_dir = make_run(steps=12, validate=())
    (run_dir / "run.json").write_text(facts)
    run = read_run(run_dir)
    assert state_text(run)[0] == text
    assert run.finished == {"Stopped": True, "Not": False}.get(text.split()[0])


def test_report_of_a_single_step_without_config(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(steps=1, validate=(), config=None, total=None)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss')
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert ">1 step<" in text
    assert "Settings" not in text


def test_command_writes_where_it_is_told(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(steps=3, validate=(), only="loss")
    target = tmp_path / "elsewhere" / "page.html"
    assert main([str(run_dir), "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert not (run_dir / "report.html").exists()
    assert [path for path in target.parent.iterdir() if path != target] == []


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "is not a directory"),
        (lambda path: path.write_text("a file"), "is not a directory"),
        (lambda path: path.mkdir(), "metrics.jsonl does not exist"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text("")), "has no metrics"),
    ],
    ids=["nothing", "a file", "no metrics.jsonl", "empty metrics.jsonl"],
)
def test_bad_input_is_one_message_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[..., Any], message: str
) -> None:
    target = tmp_path / "run"
    prepare(target)
    assert main([str(target)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_page_that_cannot_be_written_is_one_message(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    run_dir = make_run(steps=2, validate=(), only="loss")
    assert main([str(run_dir), "--output", str(tmp_path / "file" / "page.html")]) == 1
    assert capsys.readouterr().err.startswith("error: ")

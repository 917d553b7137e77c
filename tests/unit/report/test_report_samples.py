from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_lmpo.report import write_report
from nemo_lmpo.report.plots import ROLES
from nemo_lmpo.report.read import read_run
from nemo_lmpo.report.samples import MOST_COLUMNS, draw_samples, read_samples
from nemo_lmpo.report.summary import metric_rows
from tests.unit.report.test_report_plots import has_color, picture

PROMPTS = ("<user> sort b a", "<user> & <script>alert(1)</script>")


def line(step: int, index: int, answer: str, tokens: int, finished: bool = True) -> str:
    entry = {"step": step, "prompt_index": index, "prompt": PROMPTS[index], "answer": answer}
    return json.dumps({**entry, "tokens": tokens, "finished": finished}) + "\n"


def sampled_run(make_run: Callable[..., Path], lines: list[str]) -> Path:
    run_dir = make_run(only="loss")
    (run_dir / "samples.jsonl").write_text("".join(lines))
    return run_dir


def test_answers_stand_side_by_side(make_run: Callable[..., Path]) -> None:
    lines = [line(0, 0, "first <b>", 3), line(0, 1, "", 1), line(40, 0, "last", 1_000, finished=False)]
    run_dir = sampled_run(make_run, [*lines, "[1]\n", '{"step": 40}\n', '{"step": 40, "prompt'])
    (first, second) = read_samples(run_dir).prompts
    assert [answer.text for answer in first.answers] == ["first <b>", "last"]
    assert [answer and answer.text for answer in second.answers] == ["", None]
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "<h2>Sampled answers</h2>" in text
    assert "step 0, 3 tokens</th>" in text
    assert "step 0, 1 token</th>" in text
    assert "step 40, 1000 tokens (cut)</th>" in text
    assert "first &lt;b&gt;" in text
    assert "<em>no text</em>" in text
    assert "<script" not in text
    assert (run_dir / "report" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_samples_says_nothing_of_them(make_run: Callable[..., Path], example_page: Path) -> None:
    run_dir = make_run()
    assert read_samples(run_dir) is None
    assert "Sampled answers" not in example_page.read_text(encoding="utf-8")
    (run_dir / "samples.jsonl").write_text("")
    assert read_samples(run_dir) is None


def test_of_many_validations_some_are_shown(make_run: Callable[..., Path]) -> None:
    run_dir = sampled_run(make_run, [line(step, 0, "a", 1) for step in range(0, 101, 4)])
    samples = read_samples(run_dir)
    assert len(samples.steps) == 26
    # Seven parts of 25 validations: 0, 3.6, 7.1, 10.7, 14.3, 17.9, 21.4, 25.
    assert samples.shown_steps == [0, 16, 28, 44, 56, 72, 84, 100]
    assert len(samples.prompts[0].answers) == MOST_COLUMNS
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "Shown are 8 of 26 times" in text


def test_the_mean_of_their_lengths_is_drawn(make_run: Callable[..., Path]) -> None:
    run_dir = sampled_run(make_run, [line(step, index, "a", 10 * index + step) for step in (0, 40) for index in (0, 1)])
    drawn = draw_samples(read_samples(run_dir), read_run(run_dir))
    pixels = picture(drawn.png)
    assert has_color(pixels, ROLES["margin"])
    # From 5 at step 0 to 45 at step 40: the line ends higher than it begins.
    color = np.array([int(ROLES["margin"][start : start + 2], 16) for start in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(pixels - color).max(axis=2) <= 12)
    below_legend = rows > 80
    rows, columns = rows[below_legend], columns[below_legend]
    assert rows[columns.argmin()] > rows[columns.argmax()] + 100


def test_the_table_of_results_has_their_length(make_run: Callable[..., Path]) -> None:
    run_dir = make_run(validate=())
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step, length in ((10, 31.5), (40, 18.25)):
            file.write(json.dumps({"step": step, "val/loss": 3.0 / step, "val/samples/length": length}) + "\n")
    header, rows = metric_rows(read_run(run_dir))
    assert header[2:] == ["validation, first (step 10)", "validation, best and last (step 40)"]
    assert rows[-1] == ["sampled answers, tokens", "-", "31.5", "18.25"]

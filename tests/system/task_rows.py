"""Two rows for each of the leaderboard's tasks, in the form that their datasets have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalculus")


class _Loader(yaml.SafeLoader):
    """Reads task files without their functions."""


_Loader.add_constructor("!function", lambda loader, node: None)


def _write(folder: Path, name: str, rows: Sequence[dict[str, Any]], shots: Sequence[dict[str, Any]] = ()) -> None:
    for suffix, content in (("", rows), (".fewshot", shots)):
        if content:
            text = "".join(json.dumps(row) + "\n" for row in content)
            (folder / f"{name}{suffix}.jsonl").write_text(text)


def _arc(number: int) -> dict[str, Any]:
    choices = {"text": ["Mars", f"Moon {number}", "Sun", "Sirius"], "label": list("ABCD")}
    return {"id": str(number), "question": f"Which is planet number {number}?", "choices": choices, "answerKey": "A"}


def _winogrande(number: int) -> dict[str, Any]:
    sentence = f"The cup {number} fell because _ was loose."
    return {"sentence": sentence, "option1": "the shelf", "option2": "the cup", "answer": "1"}


def _gsm8k(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} and 1?", "answer": f"{number}+1={number + 1}\n#### {number + 1}"}


def _mmlu_pro(number: int) -> dict[str, Any]:
    row = {"question_id": number, "question": f"{number}+2?", "options": ["3", "4"], "answer": "B", "answer_index": 1}
    return {**row, "cot_content": "", "category": "math", "src": ""}


def write_task_rows(folder: Path, harness: Path) -> None:
    """Fill a folder for `--task-data`; ``harness`` is where lm_eval lies, whose BBH tasks name their own choices."""
    folder.mkdir(parents=True)
    _write(folder, "arc_challenge", [_arc(0), _arc(1)], [_arc(number) for number in range(2, 30)])
    _write(folder, "winogrande", [_winogrande(0), _winogrande(1)], [_winogrande(number) for number in range(2, 9)])
    _write(folder, "gsm8k", [_gsm8k(1), _gsm8k(2)], [_gsm8k(number) for number in range(3, 10)])
    _write(folder, "leaderboard_mmlu_pro", [_mmlu_pro(1), _mmlu_pro(2)], [_mmlu_pro(number) for number in range(3, 10)])
    choices = {"choices": ["Blue", "Azure", "Red"], "labels": [1, 1, 0]}
    _write(folder, "truthfulqa_mc2", [{"question": "The sky?", "mc1_targets": choices, "mc2_targets": choices}] * 2)
    asked = [("punctuation:no_comma", "Write without commas."), ("change_case:english_lowercase", "Say hello.")]
    _write(
        folder,
        "leaderboard_ifeval",
        [
            {"key": key, "prompt": prompt, "instruction_id_list": [kind], "kwargs": [{}]}
            for key, (kind, prompt) in enumerate(asked)
        ],
    )
    for name in ("main", "diamond", "extended"):
        wrong = {f"Incorrect Answer {number}": f"+{number}" for number in (1, 2, 3)}
        _write(folder, f"leaderboard_gpqa_{name}", [{"Question": "Charge?", "Correct Answer": "-1", **wrong}] * 2)
    for name in ("murder_mysteries", "object_placements", "team_allocation"):
        row = {"narrative": "Ann held it.", "question": "Who?", "choices": "['Ann', 'Bob']", "answer_index": 0}
        _write(folder, f"leaderboard_musr_{name}", [{**row, "answer_choice": "Ann"}] * 2)
    for name in _MATH:
        row = {"problem": "Find $1+1$.", "level": "Level 5", "type": "x", "solution": "It is $\\boxed{2}$."}
        _write(folder, f"leaderboard_math_{name}_hard", [row] * 2)
    for path in sorted((harness / "tasks" / "leaderboard" / "bbh_mc").glob("*.yaml")):
        task = yaml.load(path.read_text(), _Loader)  # noqa: S506
        if "doc_to_choice" in task:
            _write(folder, task["task"], [{"input": "Is it?", "target": task["doc_to_choice"][0]}] * 2)

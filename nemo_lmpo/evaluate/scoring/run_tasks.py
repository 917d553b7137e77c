"""Tasks of the Open LLM Leaderboard by `lm_eval`. Runs in the scoring environment.

Request: ``model`` (``kind`` hf or endpoint, ``arguments`` of the harness's class for it, and its template), ``tasks``,
``folder`` for a file per task, ``data`` (a folder with rows instead of the Hub) and ``limit``. A task whose file is
there is not run again. The model is loaded once, when the first task is missing. Answer: nothing.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml


class DoubleBos(Exception):
    """A prompt began with two BOS tokens."""


_FOLDERS = ("arc", "gsm8k", "leaderboard", "truthfulqa", "winogrande")
"""Where the harness has the leaderboard's tasks."""


def open_tasks(names: Sequence[str]) -> Any:
    """The harness's index of its tasks. That of all 13,000 files takes ten seconds, so only if it must be."""
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    few = tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in _FOLDERS])
    known = few.task_index
    found = all(name in known and all(member in known for member in subtasks(few, name)) for name in names)
    return few if found else tasks.TaskManager()


def subtasks(manager: Any, name: str) -> list[str]:
    """The tasks of a group, or the task itself."""
    members = (manager.task_index[name].cfg or {}).get("task")
    return list(members) if isinstance(members, list) else [name]


class Harness:
    """The model and the tasks of one request."""

    def __init__(self, request: dict[str, Any], scratch: Path) -> None:
        self.request, self.scratch = request, scratch

    @cached_property
    def model(self) -> Any:
        """The harness's model; its tokens are watched for two BOS in front."""
        told = self.request["model"]
        if told["kind"] == "hf":
            from lm_eval.models.huggingface import HFLM as Harnessed
        else:
            from lm_eval.models.openai_completions import LocalCompletionsAPI as Harnessed

        model: Any = Harnessed(**told["arguments"])
        model.tokenizer.chat_template = told["chat_template"]
        _watch(model)
        return model

    @cached_property
    def _manager(self) -> Any:
        return open_tasks([task["harness"] for task in self.request["tasks"]])

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """One task's scores by document."""
        from lm_eval import evaluator

        evaluator.add_env_info = lambda storage: None  # asks pip and compilers for what nobody reads, every time
        told = self.request["model"]
        if told["kind"] == "endpoint":
            # A rendered conversation has its BOS; the API class adds none by itself.
            self.model.add_bos_token = told["adds_bos"] and not task["chat_template"]
        members = subtasks(self._manager, task["harness"])
        names = self._prepared(task, members)
        results = evaluator.simple_evaluate(
            self.model,
            tasks=names,
            num_fewshot=task["shots"],
            limit=self.request["limit"],
            apply_chat_template=task["chat_template"],
            system_instruction=told["system_prompt"] if task["chat_template"] else None,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=self._manager,
        )
        scores = _scores(results["samples"], task["metric"], task["filter"])
        return {"task": task, "scores": scores, "versions": results["versions"], "subtasks": members}

    def _prepared(self, task: dict[str, Any], members: Sequence[str]) -> list[Any]:
        """What to give to the harness: the registered name, or files that include its tasks and change what is told."""
        data = self.request["data"]
        if data is None and not task["until"]:
            return [task["harness"]]
        prepared = []
        for name in members:
            content: dict[str, Any] = {
                "include": str(self._manager.task_index[name].yaml_path),
                "task": f"local_{name}",
            }
            if data is not None:
                content.update(_local_rows(Path(data), name, self._manager.task_index[name].cfg or {}))
            if task["until"]:
                content["generation_kwargs"] = {"until": task["until"], "do_sample": False, "temperature": 0.0}
            path = self.scratch / task["name"] / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(content))
            prepared.append(str(path))
        return prepared


def _local_rows(data: Path, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Rows from `TASK.jsonl`, those of the shots from `TASK.fewshot.jsonl` where there is one."""
    rows = data / f"{name}.jsonl"
    if not rows.is_file():
        raise FileNotFoundError(f"--task-data {data} holds no {rows.name}; write its rows there")
    shots = data / f"{name}.fewshot.jsonl"
    judged = config.get("test_split") or config.get("validation_split") or "test"
    splits = {str(config.get(key)) for key in ("training_split", "validation_split", "fewshot_split", "test_split")}
    files = {split: str(shots if shots.is_file() else rows) for split in splits - {"None", str(judged)}}
    files[str(judged)] = str(rows)
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def _scores(samples: dict[str, list[dict[str, Any]]], metric: str, wanted: str) -> dict[str, list[list[float]]]:
    """By task: document and score."""
    scores = {}
    for name, rows in samples.items():
        kept = [row for row in rows if row.get("filter", "none") == wanted]
        scores[name.removeprefix("local_")] = [[row["doc_id"], float(row[metric])] for row in kept]
    return scores


def _watch(model: Any) -> None:
    """Look at every prompt's first tokens."""
    bos, pad = model.tokenizer.bos_token_id, model.tokenizer.pad_token_id
    encode = model.tok_encode
    encode_batch: Any = getattr(model, "tok_batch_encode", None)

    def check(rows: Sequence[Sequence[int]]) -> None:
        if bos is not None and any(list(row[:2]) == [bos, bos] for row in rows):
            raise DoubleBos("a prompt begins with two BOS tokens; correct the chat template or the tokenizer")

    def checked(*arguments: Any, **options: Any) -> Any:
        found = encode(*arguments, **options)
        check(found if found and isinstance(found[0], list) else [found])
        return found

    def checked_batch(*arguments: Any, **options: Any) -> Any:
        ids, mask = encode_batch(*arguments, **options)
        if bos != pad:
            check([list(itertools.dropwhile(lambda token: token == pad, row)) for row in ids.tolist()])
        return ids, mask

    model.tok_encode = checked
    if encode_batch is not None:
        model.tok_batch_encode = checked_batch


def write(path: Path, content: Any) -> None:
    """So that nobody sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def answer(request: dict[str, Any]) -> None:
    """Run what is missing."""
    logging.disable(logging.INFO)
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        harness = Harness(request, Path(scratch))
        for task in request["tasks"]:
            path = folder / f"{task['name']}.json"
            if not path.exists():
                write(path, harness.run(task))
            sys.stdout.write(f"done {task['name']}\n")
            sys.stdout.flush()

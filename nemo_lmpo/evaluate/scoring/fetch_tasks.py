"""Download the rows of `lm_eval` tasks into the Hub's cache, in the scoring environment. Request: ``tasks``."""

from __future__ import annotations

from typing import Any


def answer(request: dict[str, Any]) -> None:
    """Loading a task downloads its rows."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in request["tasks"]:
        manager.load([name])

"""Download the rows of `lm_eval` tasks into the Hub's cache: ``fetch_tasks.py REQUEST ANSWER``, with ``tasks``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Loading a task downloads its rows."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    names = json.loads(Path(sys.argv[1]).read_text())["tasks"]
    for name in names:
        manager.load([name])
    Path(sys.argv[2]).write_text("{}")


if __name__ == "__main__":
    main()

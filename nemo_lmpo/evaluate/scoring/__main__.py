"""Runs a program of this folder: ``scoring NAME REQUEST ANSWER``, the latter two paths of JSON files."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Read the request, write the answer."""
    name, asked, answered = sys.argv[1:]
    answer = importlib.import_module(name).answer(json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()

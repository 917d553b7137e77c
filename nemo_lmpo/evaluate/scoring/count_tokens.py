"""Lengths in cl100k tokens, as Arena-Hard counts them. Runs in the scoring environment.

Request: ``texts``. The tables come with litellm's wheel, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any


def use_packaged_tables() -> None:
    """Point tiktoken to tables on disk where litellm is installed."""
    found = importlib.util.find_spec("litellm")
    if found is not None and found.origin is not None:
        for name in ("litellm_core_utils/tokenizers", "llms/tokenizers"):
            folder = Path(found.origin).parent / name
            if folder.is_dir():
                os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))
                return


def answer(request: dict[str, Any]) -> list[int]:
    """How many tokens each text has."""
    use_packaged_tables()
    import tiktoken

    encoding = tiktoken.get_encoding("cl100k_base")
    return [len(encoding.encode(text, disallowed_special=())) for text in request["texts"]]

"""Lengths in cl100k tokens, as Arena-Hard counts them. In the scoring environment: ``count_tokens.py REQUEST ANSWER``.

Request: ``texts``. The tables come with litellm's wheel, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path


def use_packaged_tables() -> None:
    """Point tiktoken to tables on disk where litellm is installed."""
    found = importlib.util.find_spec("litellm")
    if found is not None and found.origin is not None:
        for name in ("litellm_core_utils/tokenizers", "llms/tokenizers"):
            folder = Path(found.origin).parent / name
            if folder.is_dir():
                os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))
                return


def main() -> None:
    """Read the request, write the answer."""
    use_packaged_tables()
    import tiktoken

    encoding = tiktoken.get_encoding("cl100k_base")
    texts = json.loads(Path(sys.argv[1]).read_text())["texts"]
    counts = [len(encoding.encode(text, disallowed_special=())) for text in texts]
    Path(sys.argv[2]).write_text(json.dumps(counts))


if __name__ == "__main__":
    main()

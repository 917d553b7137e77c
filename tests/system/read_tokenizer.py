"""`read_tokenizer.py DIR...` with texts on standard input: what the slow tokenizer of transformers 4 makes of them."""

from __future__ import annotations

import json
import sys
from typing import Any


def read_tokenizer(directory: str, texts: list[str]) -> dict[str, Any]:
    """Ids of each text with and without BOS and EOS, and the special tokens; or why it cannot be loaded."""
    from transformers import LlamaTokenizer

    try:
        tokenizer = LlamaTokenizer.from_pretrained(directory)
    except Exception as error:  # whatever it is, it is not loaded
        return {"refused": f"{type(error).__name__}: {error}"}
    return {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "size": len(tokenizer),
        "special": {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")},
    }


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    print(json.dumps({directory: read_tokenizer(directory, given) for directory in sys.argv[1:]}))

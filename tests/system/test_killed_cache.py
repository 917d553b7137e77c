"""A process that is killed while it tokenizes leaves nothing that matters: the next one makes the same cache."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

ROWS = 4000
CODE = """
import sys
from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.data.tokenizer import load_tokenizer

path, cache = sys.argv[1:]
config = DataConfig(train=DatasetConfig(path=path), cache_dir=cache, num_workers=1, max_length=64, max_prompt_length=32)
data = load_preference_dataset(config, config.train, load_tokenizer("builtin:tiny"), name="train")
print(data.token_hash())
"""


def tokenize(pairs: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CODE, str(pairs), str(cache)], stdout=subprocess.PIPE, text=True)


def content(cache: Path) -> dict[str, bytes]:
    """Files of the cache by name; locks hold nothing."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def test_killed_while_it_tokenizes(tmp_path: Path) -> None:
    letters = "abcdefghij"
    rows = [
        {
            "prompt": f"sort {letters[i % 10]} {letters[i // 10 % 10]} {letters[i // 100 % 10]} {letters[i // 1000]}",
            "chosen": letters[i % 10],
            "rejected": f"{letters[(i + 1) % 10]} {letters[i // 10 % 10]}",
        }
        for i in range(ROWS)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = tokenize(pairs, tmp_path / "whole")
    expected, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0
    killed = 0
    for moment in (0.0, 0.05, 0.2):
        process = tokenize(pairs, tmp_path / "cut")
        while process.poll() is None and not list((tmp_path / "cut").rglob("*.tmp-*")):
            time.sleep(0.002)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 1, "no process was cut in its work"
    last = tokenize(pairs, tmp_path / "cut")
    found, _ = last.communicate(timeout=300)
    assert (last.returncode, found) == (0, expected)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.tmp-*"))

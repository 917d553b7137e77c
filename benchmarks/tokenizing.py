"""Tokenizing preference pairs against the tokenizer alone and against TRL, alternated in one run.

    python benchmarks/tokenizing.py --tokenizer DIRECTORY --pairs FILE [--repeat 8] [--rounds 3]

The tokenizer alone gets the same texts (each pair's prompt and both answers, as rendered) in one call, which uses all
of its threads. Ours is the whole way from the file to a checked store, cold. TRL's is `DPOTrainer`'s own preparation of
the dataset, without a model and with a cache folder of its own. Of busy machines believe the processor seconds first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.preference import load_preference_dataset, pair_encoder
from nemo_lmpo.data.rows.form import RowForm
from nemo_lmpo.data.tokenizer import load_tokenizer

LENGTHS = {"max_length": 2048, "max_prompt_length": 1024}


def measured(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of processors, those of ended child processes included."""
    before, started = sum(os.times()[:4]), time.monotonic()
    action()
    return time.monotonic() - started, sum(os.times()[:4]) - before


def write_rows(source: Path, repeat: int, target: Path) -> list[dict[str, Any]]:
    """The rows of a file, so many times."""
    read: Any = gzip.open if source.suffix == ".gz" else open
    with read(source, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream] * repeat
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def ours(tokenizer: Any, path: Path, workers: int | None) -> None:
    """From the file to the store."""
    with tempfile.TemporaryDirectory() as cache:
        train = DatasetConfig(path=str(path))
        config = DataConfig(train=train, cache_dir=cache, num_workers=workers, **LENGTHS)  # type: ignore[arg-type]
        load_preference_dataset(config, train, tokenizer)


def trl(tokenizer: Any, path: Path, workers: int) -> None:
    """What `DPOTrainer` does with a dataset before it trains."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as cache:
        columns = ["prompt", "chosen", "rejected"]
        rows = datasets.load_dataset("json", data_files=str(path), cache_dir=cache, split="train").select_columns(
            columns
        )
        rows = rows.map(_as_messages)
        settings = DPOConfig(output_dir=cache, dataset_num_proc=workers, max_length=2048, use_cpu=True, bf16=False)
        DPOTrainer._prepare_dataset(SimpleNamespace(), rows, tokenizer, settings, "train")


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    def messages(value: Any, role: str) -> Any:
        return [{"role": role, "content": value}] if isinstance(value, str) else value[-1:]

    return {name: messages(row[name], "user" if name == "prompt" else "assistant") for name in row}


def texts_of(tokenizer: Any, rows: list[dict[str, Any]]) -> list[str]:
    """Each pair's texts as the chat template has them."""
    encoder: Any = pair_encoder(DataConfig(**LENGTHS), tokenizer)  # type: ignore[arg-type]
    rendered = encoder.chat.render([RowForm().parse(row) for row in rows])
    return [text for pair in rendered for text in (pair.prompt, pair.chosen, pair.rejected)]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model's directory with a fast tokenizer")
    parser.add_argument("--pairs", required=True, type=Path, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--repeat", type=int, default=8, help="how often the rows are written (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    wanted = parser.parse_args()
    tokenizer = load_tokenizer(wanted.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        rows = write_rows(wanted.pairs, wanted.repeat, path)
        texts = texts_of(tokenizer, rows)
        backend = tokenizer.backend_tokenizer
        ways: dict[str, Callable[[], object]] = {
            "tokenizer alone": lambda: [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)],
            "ours, one process": lambda: ours(tokenizer, path, None),
            "ours, two processes": lambda: ours(tokenizer, path, 2),
        }
        if not wanted.no_trl:
            ways |= {f"TRL, {n} process{'es' * (n > 1)}": lambda n=n: trl(tokenizer, path, n) for n in (1, 2)}  # type: ignore[misc]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(wanted.rounds):
            for name, way in ways.items():
                found[name].append(measured(way))
    print(f"{len(rows):,} pairs, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {wanted.rounds}\n")
    print("| way | pairs/s | processor s | of the tokenizer's rate | of its processor time |\n|---|---|---|---|---|")
    best = [statistics.median(one[part] for one in found["tokenizer alone"]) for part in (0, 1)]
    for name, times in found.items():
        wall, busy = (statistics.median(one[part] for one in times) for part in (0, 1))
        print(f"| {name} | {len(rows) / wall:,.0f} | {busy:.2f} | {best[0] / wall:.2f} | {best[1] / busy:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

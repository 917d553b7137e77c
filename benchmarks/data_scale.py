"""Start-up time and memory of one training process for many preference pairs.

    python benchmarks/data_scale.py --pairs 100000 1000000 [--output FILE]

Generated pairs of about twelve tokens in all are written as JSON lines; then, each in a process of its own: the pairs
are tokenized into the cache; a second start finds them there; steps are planned. Memory is a process' own (what is not
backed by a file that the kernel can drop), less what it had before the data. `--synthesize` writes the cache's files at
once instead of tokenizing, for numbers of pairs that would take long to tokenize.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

GLOBAL_BATCH = 128
STEPS = 50
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--folder", help="where data and cache are written; unset: a temporary directory")
    parser.add_argument("--synthesize", action="store_true", help="write the cache without tokenizing")
    parser.add_argument("--output", type=Path, help="write the result as Markdown, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_pairs(path: Path, count: int) -> None:
    """JSON lines with short prompts and answers, no two alike."""
    with path.open("w") as stream:
        for number in range(count):
            letters = [LETTERS[(number // 26**place) % 26] for place in range(6)]
            chosen, rejected = " ".join(letters[:3]), " ".join(letters[3:]) + " ok"
            row = {"prompt": "sort " + " ".join(letters), "chosen": chosen, "rejected": rejected}
            stream.write(json.dumps(row) + "\n")


def write_store(source: Any, encoder: Any, form: Any, directory: Path, **settings: Any) -> None:
    """In place of tokenizing: as many pairs of random ids as the source has lines."""
    import pyarrow as pa

    from nemo_lmpo.data.store import PAIRS_FILE, pairs_schema, summarize_store
    from nemo_lmpo.data.tokenize import BATCH_ROWS

    with Path(source.name).open("rb") as stream:
        count = sum(1 for _ in stream)
    random = np.random.default_rng(0)
    with pa.OSFile(str(directory / PAIRS_FILE), "wb") as file, pa.ipc.new_stream(file, pairs_schema()) as writer:
        for start in range(0, count, BATCH_ROWS):
            rows = min(BATCH_ROWS, count - start)
            numbers = np.arange(start + 1, start + rows + 1)
            columns = {"number": numbers, "example_id": [f"{source.short_name}:{number}" for number in numbers]}
            for part, tokens in (("prompt", 9), ("chosen", 4), ("rejected", 5)):
                ids = pa.array(random.integers(10, 40, rows * tokens), pa.int32())
                ends = pa.array(np.arange(0, rows * tokens + 1, tokens), pa.int32())
                columns[f"{part}_ids"] = pa.ListArray.from_arrays(ends, ids)
            columns |= {name: [False] * rows for name in ("prompt_cut", "response_cut", "special_tokens")}
            columns |= {name: [None] * rows for name in ("reason", "detail")}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=pairs_schema()))
    summarize_store(directory)


def own_mib() -> float:
    """Memory of this process that no file stands behind, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("error: this kernel does not tell a process' own memory")


def child(path: str, cache: str, workers: int, synthesize: bool) -> dict[str, float]:
    """Load the data and plan steps."""
    from nemo_lmpo.config.schema import DataConfig, DatasetConfig
    from nemo_lmpo.data import preference
    from nemo_lmpo.data.order import PairSampler
    from nemo_lmpo.data.pack import plan_micro_batches
    from nemo_lmpo.data.preference import load_preference_dataset
    from nemo_lmpo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny")
    config = DataConfig(
        train=DatasetConfig(path="builtin:tiny", limit=200), cache_dir=cache, num_workers=workers, max_length=64,
        max_prompt_length=32,
    )  # fmt: skip
    load_preference_dataset(config, config.train, tokenizer)  # loads the libraries
    config.train = DatasetConfig(path=path)
    if synthesize:
        preference.tokenize_source = write_store  # type: ignore[attr-defined]
    before = own_mib()
    started = time.perf_counter()
    data = load_preference_dataset(config, config.train, tokenizer)
    loaded = time.perf_counter()
    sampler = PairSampler(len(data), GLOBAL_BATCH, 42)
    sampler.pairs_of_step(0)
    ordered = time.perf_counter()
    seconds = []
    for step in range(1, min(STEPS, sampler.steps_per_epoch - 1) + 1):
        begun = time.perf_counter()
        indices = sampler.pairs_of_step(step)
        plan_micro_batches(
            data.lengths[indices], dp_size=1, row_tokens=128, max_examples_per_row=None, share_prompt=True
        )
        for index in indices.tolist():
            data[index]
        seconds.append(time.perf_counter() - begun)
    return {
        "load_s": loaded - started,
        "order_s": ordered - loaded,
        "plan_ms": 1000 * statistics.median(seconds),
        "own_mib": own_mib() - before,
        "bytes_a_pair": (own_mib() - before) * 2**20 / len(data),
    }


def run_child(options: argparse.Namespace, path: Path, cache: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--child",
        json.dumps([str(path), str(cache), options.workers, options.synthesize]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the measurement failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(options: argparse.Namespace, count: int, folder: Path) -> list[dict[str, Any]]:
    """First start (tokenizing) and second start of ``count`` pairs."""
    path, cache = folder / f"pairs_{count}.jsonl", folder / f"cache_{count}"
    write_pairs(path, count)
    return [{"pairs": count, "start": start, **run_child(options, path, cache)} for start in ("first", "second")]


def report(results: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}; "
        f"global batch {GLOBAL_BATCH}.",
        "",
        "| pairs | start | load s | order of an epoch s | plan and read a step ms | own memory MiB | bytes per pair |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        times = f"{row['load_s']:.2f} | {row['order_s']:.2f} | {row['plan_ms']:.1f}"
        lines.append(
            f"| {row['pairs']:,} | {row['start']} | {times} | {row['own_mib']:.0f} | {row['bytes_a_pair']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    if options.child:
        print(json.dumps(child(*json.loads(options.child))))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in options.pairs:
            results += measure(options, count, Path(folder))
            print(report(results[-2:]), file=sys.stderr)
    text = report(results)
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()

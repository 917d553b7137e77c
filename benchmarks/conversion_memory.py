#!/usr/bin/env python
"""Peak memory and time of the converters on a Llama-shaped random checkpoint (3 GB in bfloat16 by default).

    python benchmarks/conversion_memory.py [--gigabytes 3] [--mixture] [--directory DIR]

Each conversion runs in a process of its own; its peak resident memory is what the kernel counted, mapped files
included. The promise is at most 1.25 times the model's bytes plus 1 GB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from nemo_lmpo.formats.architecture import Architecture, Experts, architecture_to_hf

LLAMA = Architecture(
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_layers=16,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)

_MIXTURE = replace(
    LLAMA,
    model_type="mixtral",
    vocab_size=32000,
    ffn_hidden_size=3584,
    experts=Experts(number=8, per_token=2, ffn_hidden_size=3584),
)


def main() -> None:
    """Make the checkpoint, convert it there and back, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint (decimal, default 3)")
    parser.add_argument("--mixture", action="store_true", help="of a Mixtral-shaped checkpoint of 8 experts")
    parser.add_argument("--directory", type=Path, help="where to write about five times as much (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        shape = _MIXTURE if options.mixture else LLAMA
        architecture = sized(shape, int(options.gigabytes * 1e9))
        size = 2 * architecture.num_parameters()
        # Apart, because the kernel counts the memory of the starting process as its children's.
        maker = multiprocessing.get_context("spawn").Process(target=_make, args=(directory / "hf", architecture))
        maker.start()
        maker.join()
        print(f"{architecture.num_layers} layers, {size / 1e9:.2f} GB in bfloat16, {os.cpu_count()} cores")
        print(f"bound: {(1.25 * size + 1e9) / 1e9:.2f} GB (bfloat16), {(2.5 * size + 1e9) / 1e9:.2f} GB (float32)")
        print(f"{'conversion':<34}{'peak resident':>14}{'time':>9}")
        nemo = directory / "model.nemo"
        _measure("imports alone", "hf-to-nemo", "--input", directory / "hf", "--output", nemo, "--dry-run")
        _measure("HF -> .nemo", "hf-to-nemo", "--input", directory / "hf", "--output", nemo)
        _measure("HF -> directory", "hf-to-nemo", "--input", directory / "hf", "--output", directory / "tree")
        _measure(".nemo -> HF", "nemo-to-hf", "--input", nemo, "--output", directory / "back")
        _remove(directory / "tree", directory / "back")
        wide = directory / "wide.nemo"
        _measure("HF -> .nemo, float32", "hf-to-nemo", "--input", directory / "hf", "--output", wide, "--dtype", "fp32")


def sized(shape: Architecture, target: int) -> Architecture:
    """As many layers as come closest to ``target`` bytes in bfloat16."""
    one, two = (2 * replace(shape, num_layers=layers).num_parameters() for layers in (1, 2))
    return replace(shape, num_layers=max(1, round((target - one) / (two - one)) + 1))


def _make(directory: Path, architecture: Architecture) -> None:
    import torch

    from nemo_lmpo.formats.huggingface import write_safetensors
    from nemo_lmpo.formats.source import RandomSource

    directory.mkdir()
    source = RandomSource(architecture, 0, torch.bfloat16)
    write_safetensors(directory, source, dtype=torch.bfloat16, max_shard_bytes=1_000_000_000)
    config = {**architecture_to_hf(architecture), "torch_dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))


def _measure(label: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "nemo_lmpo.convert", *map(str, arguments), "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    print(f"{label:<34}{_bytes(usage) / 1e9:>11.2f} GB{time.perf_counter() - start:>7.1f} s", flush=True)


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _remove(*directories: Path) -> None:
    import shutil

    for directory in directories:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

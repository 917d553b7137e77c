"""Run directories as a run leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = """\
name: lmpo_example
model: {restore_from_path: org/model, global_batch_size: 128, tensor_model_parallel_size: 2, context_parallel_size: 1}
data: {train: {path: 'pairs <one> & two.jsonl'}, max_length: 2048}
loss: {name: lmpo, beta: 2.0, margin: {kind: power5}}
optim: {lr: 6.0e-07}
trainer: {max_steps: null, precision: bf16}
checkpoint: {monitor: val/rewards/accuracies, mode: max}
"""


def training_metrics(step: int) -> dict[str, float]:
    return {
        "loss": 2.0 / step,
        "rewards/chosen": -1.0 - 0.01 * step,
        "rewards/rejected": -1.0 - 0.02 * step,
        "rewards/margins": 0.01 * step,
        "rewards/accuracies": min(1.0, 0.5 + 0.01 * step),
        "logps/chosen": -0.5 - 0.005 * step,
        "logps/rejected": -0.5 - 0.01 * step,
        "logps/chosen_sum": -50.0,
        "logps/rejected_sum": -60.0,
        "lengths/chosen": 100.0,
        "lengths/rejected": 120.0,
        "lmpo/margin": 0.4,
        "lmpo/margin_normalized": 0.1,
        "lmpo/mean": 0.4,
        "lmpo/std": 0.05,
        "lmpo/p_chosen": 0.5,
        "lmpo/p_rejected": 0.4,
        "grad_norm": 3.0,
        "lr": 1e-7 * step,
        "perplexity": 8.0 / step,
        "token_accuracy": min(1.0, 0.3 + 0.01 * step),
        "pairs_per_second": 3.0,
        "conversations_per_second": 3.0,
        "tokens_per_second": 3000.0,
        "memory/peak": 60.0,
    }


def write_run(
    root: Path,
    steps: int = 40,
    validate: tuple[Any, ...] = (10, 20, 30, 40),
    name: str = "run",
    config: str | None = CONFIG,
    total: int | None = 40,
    only: str | None = None,
) -> Path:
    """A run directory under ``root``: training every step, validation where said; ``only``: of one metric."""
    run_dir = root / name
    run_dir.mkdir()
    lines = []
    for step in range(1, steps + 1):
        metrics = {name: value for name, value in training_metrics(step).items() if only in (None, name)}
        lines.append({"step": step, "time": 1_750_000_000.0 + step, **metrics})
        if step in validate:
            # Accuracy is best at step 20: 0.5, 0.9, 0.8, 0.7.
            values = {"loss": 3.0 / step, "rewards/accuracies": 0.5 if step == 10 else 1.1 - step / 100}
            lines.append({"step": step, "time": 0.0, **{f"val/{key}": value for key, value in values.items()}})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        (run_dir / "config.yaml").write_text(config)
    if total:
        (run_dir / "run.json").write_text(json.dumps({"total_steps": total}))
    return run_dir

"""Takes from a finished run the numbers that it is compared by."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.builtin.tiny_task import is_right
from nemo_lmpo.data.preference import load_preference_dataset
from nemo_lmpo.loss.packages import find_options
from nemo_lmpo.paper.comparison.runs import MEASURED_FILE
from nemo_lmpo.paper.comparison.scales import Scale
from nemo_lmpo.report.read import VALIDATION, Metrics, read_config, read_metrics
from nemo_lmpo.runtime.files import replace_file

_EXAMPLES = 4


def measure(run: Path, scale: Scale) -> None:
    """Measure a trained run and keep the result in its directory; its presence says that the run is finished."""
    metrics = read_metrics(run / "metrics.jsonl")
    values = from_metrics(metrics)
    examples: list[dict[str, str]] = []
    if scale.answers and f"{VALIDATION}loss" in metrics.series:
        answered, examples = _answers(run, scale)
        values.update(answered)
    measured = {"values": values, "examples": examples}
    replace_file(run / MEASURED_FILE, json.dumps(measured, indent=1, ensure_ascii=False))


def from_metrics(metrics: Metrics) -> dict[str, float]:
    """What the last validation and the steps say; a run without validation pairs has no held-out numbers."""

    def last(name: str) -> float:
        series = metrics.get(name)
        return series.finite().values[-1] if series is not None else math.nan

    values = {
        "accuracy": 100 * last(f"{VALIDATION}rewards/accuracies"),
        "chosen": last(f"{VALIDATION}logps/chosen"),
        "rejected": last(f"{VALIDATION}logps/rejected"),
        "memory": last("memory/peak"),
    }
    values["margin"] = values["chosen"] - values["rejected"]
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _answers(run: Path, scale: Scale) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Greedy answers of the last checkpoint to held-out prompts."""
    import torch

    from nemo_lmpo.answers.engine import load_generator
    from nemo_lmpo.answers.sampling import Sampling

    config = read_config(run)
    if not torch.cuda.is_available() and config["trainer"]["num_threads"]:
        torch.set_num_threads(config["trainer"]["num_threads"])
    generator = load_generator(run)
    data = DataConfig(**{**config["data"], "validation": DatasetConfig(**config["data"]["validation"])})
    takes = find_options(config["loss"]["name"]).takes
    pairs = load_preference_dataset(data, data.validation, generator.tokenizer, name="validation", takes=takes)
    chosen = [pairs[index] for index in range(min(scale.answers, len(pairs)))]
    prompts = [pair.prompt_ids for pair in chosen]
    responses = generator.respond(prompts, Sampling(max_new_tokens=scale.answer_tokens, batch_size=32))
    texts = [generator.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    values = {
        "length": statistics.fmean(response.tokens or 0 for response in responses),
        "finished": 100 * statistics.fmean(response.finished for response in responses),
    }
    if str(data.validation.path).startswith("builtin:tiny"):
        right = [is_right(text, response.text) for text, response in zip(texts, responses, strict=True)]
        values["right"] = 100 * statistics.fmean(right)
    examples = [
        {"prompt": text, "answer": response.text}
        for text, response in zip(texts[:_EXAMPLES], responses[:_EXAMPLES], strict=True)
    ]
    return values, examples

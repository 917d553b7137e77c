"""What a run came to, in a few numbers: the tables at the top of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from nemo_lmpo.errors import counted
from nemo_lmpo.report.read import VALIDATION, EarlyStop, Run, Series
from nemo_lmpo.runtime.files import format_bytes

# Settings that tell one run from another, besides the whole of `loss`.
_SETTINGS = (
    "model.restore_from_path",
    "model.architecture",
    "data.train.path",
    "data.train.weights",
    "data.validation.path",
    "data.max_length",
    "data.max_prompt_length",
    "model.global_batch_size",
    "optim.lr",
    "optim.weight_decay",
    "optim.sched.name",
    "optim.sched.warmup_fraction",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.precision",
    "model.seed",
)
# Shown where the first of them is set: adapters, and what balances a mixture.
_GROUPS = (
    ("model.peft.name", "model.peft.rank", "model.peft.alpha", "model.peft.dropout", "model.peft.target_modules"),
    ("model.moe_aux_loss", "model.moe_aux_loss_coefficient"),
    ("model.moe_freeze_router",),
)
# Shown where the model is split.
_PARALLEL_SIZES = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.expert_tensor_parallel_size",
)
_LONGEST_VALUE = 160


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _plain(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


_ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", _plain),
    ("perplexity", "perplexity", _plain),
    ("token_accuracy", "token accuracy", _percent),
    ("rewards/accuracies", "accuracy", _percent),
    ("rewards/margins", "reward margin", _plain),
    ("rewards/chosen", "reward, chosen", _plain),
    ("rewards/rejected", "reward, rejected", _plain),
    ("logps/chosen", "log-prob., chosen", _plain),
    ("logps/rejected", "log-prob., rejected", _plain),
    ("lmpo/p_chosen", "probability p, chosen", _plain),
    ("lmpo/p_rejected", "probability p, rejected", _plain),
    ("samples/length", "sampled answers, tokens", _plain),
)


def setting(config: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def leaves(prefix: str, value: object) -> list[tuple[str, object]]:
    """Dotted keys with their values, of nested settings."""
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [leaf for key, inner in value.items() for leaf in leaves(f"{prefix}.{key}", inner)]


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {inner}" for key, inner in value.items() if not isinstance(inner, Mapping))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def settings_rows(run: Run) -> list[tuple[str, str]]:
    """Key settings with their values, the loss's first; unset ones are left out."""
    loss = leaves("loss", run.config.get("loss"))
    others = [(name, setting(run.config, name)) for name in _SETTINGS]
    sizes = [(name, setting(run.config, name)) for name in _PARALLEL_SIZES]
    split = [(name, value) for name, value in sizes if value != 1]
    groups = [(name, setting(run.config, name)) for names in _GROUPS if setting(run.config, names[0]) for name in names]
    return [(name, _text(value)) for name, value in [*loss, *others, *groups, *split] if value is not None]


def best_step(run: Run) -> tuple[int, str] | None:
    """The step whose validation is best, and the metric and end of it that say so; None without validation."""
    checkpoint = run.config.get("checkpoint")
    chosen = checkpoint if isinstance(checkpoint, Mapping) else {}
    name, mode = str(chosen.get("monitor", "val/loss")), str(chosen.get("mode", "min"))
    series = run.metrics.get(name)
    if series is None and name != "val/loss":
        name, mode = "val/loss", "min"
        series = run.metrics.get(name)
    if series is None:
        return None
    finite = series.finite()
    pick = max if mode == "max" else min
    _, step = pick(zip(finite.values, finite.steps, strict=True), key=lambda pair: pair[0])
    return step, f"{'highest' if mode == 'max' else 'lowest'} {name}"


def _at(series: Series | None, step: int) -> float | None:
    return dict(zip(series.steps, series.values, strict=True)).get(step) if series is not None else None


def _mean_of_last(series: Series | None, window: int) -> float | None:
    values = series.finite().values[-window:] if series is not None else []
    return fmean(values) if values else None


def metric_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results.

    Columns: mean over the last tenth of the training steps (20 at most); validation the first time, at the best
    step, and the last time. A column that would be empty, or repeat another, is left out.
    """
    window = max(1, min(20, run.metrics.last_step // 10))
    noun = f"last {window} steps" if window > 1 else "last step"
    validations = [run.metrics.get(VALIDATION + name) for name, _, _ in _ROWS]
    validated = sorted({step for series in validations if series is not None for step in series.steps})
    best = best_step(run)
    shown: dict[int, list[str]] = {}
    if validated:
        shown.setdefault(validated[0], []).append("first")
        if best is not None:
            shown.setdefault(best[0], []).append("best")
        shown.setdefault(validated[-1], []).append("last")
    if len(validated) == 1:
        shown = {validated[0]: []}
    header = ["", f"training, {noun}"]
    for step, words in sorted(shown.items()):
        header.append("validation" + (f", {' and '.join(words)}" if words else "") + f" (step {step:,})")
    rows = []
    for name, label, form in _ROWS:
        values = [_mean_of_last(run.metrics.get(name), window)]
        values += [_at(run.metrics.get(VALIDATION + name), step) for step in sorted(shown)]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else form(value) for value in values)])
    return header, rows


def saving_text(run: Run) -> str:
    """What saving took, in a sentence; empty where the run does not tell."""
    found = run.saving
    if found is None:
        return ""
    speed = f" at {found.bytes / 1e9 / found.write_seconds:.2f} GB/s" if found.write_seconds else ""
    return (
        f"{counted(found.checkpoints, 'checkpoint')}, {format_bytes(found.bytes)} written{speed}; training waited "
        f"{found.seconds:.1f} s for them, {_percent(found.share)} of its time since its last start."
    )


def _why(stop: EarlyStop) -> str:
    validations = "validation" if stop.without_better == 1 else "validations"
    what = f"no better {stop.monitor}" + ("" if stop.best is None else f" than {_plain(stop.best)}")
    return f"{what} in the last {stop.without_better:,} {validations}"


def state_text(run: Run) -> tuple[str, str]:
    """How far the run is, and a word for its state: `finished`, `unfinished` or `unknown`."""
    done = f"{run.metrics.last_step:,}"
    if run.total_steps is None:
        return f"{done} {'step' if done == '1' else 'steps'}", "unknown"
    of = f"{done} of {run.total_steps:,} steps"
    if run.early_stop is not None:
        return f"Stopped early: {of}; {_why(run.early_stop)}", "finished"
    return (f"Finished: {of}", "finished") if run.finished else (f"Not finished: {of}", "unfinished")

"""The model card: metadata for the hub, and what a reader must know of how the model came about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_lmpo.evaluate.result import Result
from nemo_lmpo.evaluate.suites import LEADERBOARD, TITLES
from nemo_lmpo.report.document import templates_of
from nemo_lmpo.report.read import Run
from nemo_lmpo.report.summary import metric_rows, settings_rows

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGES = ("nemo-lmpo", "megatron-core", "nemo-toolkit", "torch", "transformers", "datasets")
_METRICS = {"lc": "length-controlled win rate", "wr": "win rate", "length": "mean length"}


@dataclass(frozen=True)
class Card:
    """Everything that a card says."""

    name: str
    place: str
    """Hub name or directory, for the example."""
    run: Run
    config: Mapping[str, Any]
    pictures: Sequence[tuple[str, str]] = ()
    """Titles and paths beside the card."""
    evaluations: Sequence[Result] = field(default_factory=tuple)


def hub_names(values: Any) -> list[str]:
    """Those of the values that are names on the hub and no paths of this machine."""
    listed = values if isinstance(values, list) else [values]
    return [str(one) for one in listed if isinstance(one, str) and _HUB_NAME.fullmatch(one) and not Path(one).exists()]


def metadata(card: Card) -> str:
    """The card's YAML head, by `huggingface_hub`."""
    from huggingface_hub import ModelCardData

    config = card.config
    loss = str((config.get("loss") or {}).get("name", ""))
    base = hub_names((config.get("model") or {}).get("restore_from_path"))
    data = hub_names(((config.get("data") or {}).get("train") or {}).get("path"))
    found = ModelCardData(
        base_model=base[0] if base else None,
        datasets=data or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=sorted({"preference-optimization", "nemo-lmpo", loss} - {""}),
        model_name=card.name,
        eval_results=_eval_results(card.evaluations) or None,
    )
    return f"---\n{found.to_yaml()}\n---\n"


def _eval_results(results: Sequence[Result]) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.suite if result.suite != LEADERBOARD else name,
            dataset_name=TITLES[result.suite],
            metric_type=name,
            metric_name=f"{_METRICS.get(name, name)}{f', judged by {result.judge.asked}' if result.judge else ''}",
            metric_value=round(value.value, 3),
        )
        for result in results
        if result.whole
        for name, value in result.values.items()
    ]


def evaluation_rows(results: Sequence[Result]) -> list[list[str]]:
    """One line a number, with its interval and judge."""
    return [
        [
            TITLES[result.suite],
            _METRICS.get(name, name),
            f"{value.value:.2f}",
            f"{value.honest[0]:.2f} to {value.honest[1]:.2f}" if value.honest else "",
            str(result.n) if result.whole else f"{result.n} (a trial)",
            ", ".join(result.judge.answered) if result.judge else "none",
            result.date[:10],
        ]
        for result in results
        for name, value in result.values.items()
    ]


def build_card(card: Card) -> str:
    """The card's whole text."""
    header, rows = metric_rows(card.run)
    text = (
        templates_of("nemo_lmpo.export")
        .get_template("card.md.j2")
        .render(
            name=card.name,
            place=card.place,
            about=about(card.config),
            settings=settings_rows(card.run),
            metrics=rows,
            metrics_header=header,
            pictures=card.pictures,
            evaluations=evaluation_rows(card.evaluations),
            versions=", ".join(_versions()),
            command=command_of(card.config),
        )
    )
    return metadata(card) + text


def about(config: Mapping[str, Any]) -> str:
    """One sentence."""
    loss = str((config.get("loss") or {}).get("name", "?")).upper()
    start = (config.get("model") or {}).get("restore_from_path") or "random weights"
    data = ((config.get("data") or {}).get("train") or {}).get("path") or "?"
    return f"Trained from {start} with {loss} on the preference pairs of {data}, by nemo_lmpo on Megatron-Core."


def command_of(config: Mapping[str, Any]) -> str:
    """The recipe's command; the settings stand in the table above."""
    return f"python -m nemo_lmpo.train --config-name {config.get('name', 'RECIPE')}"


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found

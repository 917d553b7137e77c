"""The model card: metadata for the hub, and what a reader must know of how the model came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nemo_lmpo.evaluate.result import Result
from nemo_lmpo.evaluate.suites import LEADERBOARD, TITLES
from nemo_lmpo.export.origin import origin_of, public_config
from nemo_lmpo.formats.chat_files import renders_with_default
from nemo_lmpo.report.document import markdown_templates
from nemo_lmpo.report.escape import visible
from nemo_lmpo.report.read import Run
from nemo_lmpo.report.summary import metric_rows, setting, settings_rows

if TYPE_CHECKING:
    from nemo_lmpo.runtime.chat_record import ChatRecord

_PACKAGES = ("nemo-lmpo", "megatron-core", "nemo-toolkit", "torch", "transformers", "datasets")
_METRICS = {"lc": "length-controlled win rate", "wr": "win rate", "length": "mean length"}


def _metadata(name: str, config: Mapping[str, Any], evaluations: Sequence[Result]) -> str:
    """The card's YAML head, by `huggingface_hub`."""
    from huggingface_hub import ModelCardData

    loss = visible(str(setting(config, "loss.name") or ""))
    origin = origin_of(config)
    found = ModelCardData(
        base_model=list(origin.base_model) if len(origin.base_model) > 1 else next(iter(origin.base_model), None),
        datasets=list(origin.datasets) or None,
        language=list(origin.language) or None,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=sorted({"preference-optimization", "nemo-lmpo", loss} - {""}),
        model_name=visible(name),
        eval_results=_eval_results(evaluations) or None,
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
            metric_name=visible(
                f"{_METRICS.get(name, name)}{f', judged by {result.judge.asked}' if result.judge else ''}"
            ),
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
            f"{value.bootstrap_interval[0]:.2f} to {value.bootstrap_interval[1]:.2f}"
            if value.bootstrap_interval
            else "",
            str(result.n) if result.whole else f"{result.n} (a trial)",
            ", ".join(result.judge.answered) if result.judge else "none",
            result.date[:10],
        ]
        for result in results
        for name, value in result.values.items()
    ]


def build_card(
    run: Run,
    name: str,
    place: str,
    pictures: Sequence[tuple[str, str]],
    evaluations: Sequence[Result],
    chat: ChatRecord | None = None,
) -> str:
    """The card's whole text.

    Args:
        run: what it is about.
        name: the model's.
        place: hub name or directory, for the example.
        pictures: titles, and paths beside the card.
        evaluations: results to show.
        chat: how conversations became token ids in training.
    """
    header, rows = metric_rows(run)
    metadata = _metadata(name, run.config, evaluations)
    run = replace(run, config=public_config(run.config))
    loss = str(setting(run.config, "loss.name") or "?").upper()
    start = setting(run.config, "model.restore_from_path") or "random weights"
    given = setting(run.config, "data.train.path") or "?"
    data = ", ".join(map(str, given)) if isinstance(given, list) else given
    text = (
        markdown_templates("nemo_lmpo.export")
        .get_template("card.md.j2")
        .render(
            name=name,
            place=place,
            system_prompt=chat and chat.system_prompt,
            system_is_default=chat is not None and renders_with_default(chat),
            about=f"Trained from {start} with {loss} on the preference pairs of {data}, by nemo_lmpo on Megatron-Core.",
            settings=settings_rows(run),
            metrics=rows,
            metrics_header=header,
            pictures=pictures,
            evaluations=evaluation_rows(evaluations),
            versions=", ".join(_versions()),
            # The settings stand in the table above.
            command=f"python -m nemo_lmpo.train --config-name {run.config.get('name', 'RECIPE')}",
        )
    )
    return metadata + text


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found

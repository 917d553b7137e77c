"""The data card: metadata by which `datasets` and the hub find the pairs, and how they came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.page import count_rows, statistic_rows, summary_line
from nemo_lmpo.report.blocks import Figure
from nemo_lmpo.report.document import markdown_templates
from nemo_lmpo.report.escape import visible
from nemo_lmpo.runtime.files import replace_file


def write_card(folder: Path, name: str, form: str, summary: Mapping[str, Any], pictures: Sequence[Figure]) -> None:
    """Write `README.md`.

    Args:
        folder: of the pairs.
        name: `OWNER/NAME` on the hub, or the folder's.
        form: of the pairs file.
        summary: what `pairs.json` holds.
        pictures: that the page shows.
    """
    from huggingface_hub import DatasetCardData

    head = DatasetCardData(
        pretty_name=visible(name.rpartition("/")[2]),
        task_categories=["text-generation"],
        tags=["preference-optimization", "nemo-lmpo", "synthetic"],
        source_datasets=[source] if "/" in (source := summary["prompts"]["source"]) else None,
        configs=[{"config_name": "default", "data_files": files.pairs_file(Path(), form).name}],
    )
    text = (
        markdown_templates("nemo_lmpo.pairs")
        .get_template("card.md.j2")
        .render(
            name=name.rpartition("/")[2],
            place=name,
            about=summary_line(summary),
            counts=count_rows(summary["counts"]),
            statistics=statistic_rows(summary["statistics"]),
            models=[[model["name"], model["weights_sha256"]] for model in summary["models"]],
            settings=[[key, str(value)] for key, value in {**summary["sampling"], **summary["scores"]}.items()],
            seeds=", ".join(map(str, summary["seeds"])),
            pictures=[(figure.title, figure.path) for figure in pictures],
            versions=", ".join(f"{key} {value}" for key, value in summary["packages"].items()),
        )
    )
    replace_file(folder / files.CARD, f"---\n{head.to_yaml()}\n---\n{text}")

"""AlpacaEval's judging by its own annotator. Runs in the scoring environment.

Request: ``judge`` (name), ``rows`` with ``index``, ``instruction``, ``output_1`` (baseline) and ``output_2``, and
``folder`` for its configuration. Where the judge is says OPENAI_CLIENT_CONFIG_PATH. Answer: a preference in [1, 2]
by index, or null where the judge gave neither label.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from alpaca_eval import constants
from alpaca_eval.annotators import PairwiseAnnotator

BASE = "weighted_alpaca_eval_gpt4_turbo"
"""The configuration of the published leaderboard; only the judge's name is another."""


def judge_configuration(judge: str, folder: Path) -> Path:
    """Write the published configuration with another judge."""
    content = yaml.safe_load((Path(constants.EVALUATORS_CONFIG_DIR) / BASE / "configs.yaml").read_text())[BASE]
    # The package takes names with "instruct" for models without chat.
    # Relative to the configuration's own folder otherwise.
    content["prompt_template"] = str(Path(constants.EVALUATORS_CONFIG_DIR) / content["prompt_template"])
    content["completions_kwargs"].update(model_name=judge, requires_chatml=True, price_per_token=0.0)
    path = folder / "judge_configs.yaml"
    path.write_text(yaml.safe_dump({"judge": content}))
    return path


def answer(request: dict[str, Any]) -> dict[str, float | None]:
    """Preferences by index."""
    logging.disable(logging.INFO)
    config = judge_configuration(request["judge"], Path(request["folder"]))
    annotator = PairwiseAnnotator(annotators_config=config, caching_path=None)
    annotated = annotator.annotate_pairs(pd.DataFrame(request["rows"]), chunksize=None)
    found = {row["instruction"]: row.get("preference") for row in annotated}
    return {str(row["index"]): _preference(found.get(row["instruction"])) for row in request["rows"]}


def _preference(value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    # The package writes 0 for a draw where both outputs are equal.
    return float(value) or 1.5

"""AlpacaEval's judging by its own annotator. In the scoring environment: ``alpaca_judge.py REQUEST ANSWER``.

Request: ``judge`` (name), ``rows`` with ``index``, ``instruction``, ``output_1`` (baseline) and ``output_2``, and
``folder`` for its configuration. Where the judge is says OPENAI_CLIENT_CONFIG_PATH. Answer: a preference in [1, 2]
by index, or null where the judge gave neither label.
"""

from __future__ import annotations

import json
import logging
import math
import sys
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


def annotate(request: dict[str, Any]) -> dict[str, float | None]:
    """Preferences by index."""
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


def main() -> None:
    """Read the request, write the answer."""
    logging.disable(logging.INFO)
    request = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(annotate(request)))


if __name__ == "__main__":
    main()

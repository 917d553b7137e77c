"""AlpacaEval's numbers by its own function. Runs in the scoring environment.

Request: ``df_gamed`` (path) and ``models``, each with ``preferences`` (1 baseline, 2 model, null neither),
``lengths``, ``baseline_lengths`` (characters), ``index`` (of the instruction in the set), and ``published``, an LC to
find within ``tolerance`` at another C if it is not that of the C chosen; ``rounds`` of resampling by ``seed``.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
from alpaca_eval.metrics import glm_winrate

_FIT = glm_winrate.fit_LogisticRegressionCV


class _Fit:
    """The package's fit, which forgets the C that it chose; ``fixed`` fits with that one instead of choosing."""

    def __init__(self, fixed: float | None = None) -> None:
        self.fixed = fixed
        self.chosen: list[float] = []
        self.candidates: list[float] = []
        self.weights: dict[str, float] = {}

    def __call__(self, data: pd.DataFrame, *arguments: Any, **options: Any) -> Any:
        if self.fixed is not None:
            options.update(n_splits=0, C=self.fixed)
        model = _FIT(data, *arguments, **options)
        self.chosen = [float(self.fixed)] if self.fixed is not None else [float(value) for value in model.C_]
        self.candidates = [float(value) for value in getattr(model, "Cs_", [])]
        names = [column for column in data.columns if column != "preference"]
        self.weights = dict(zip(names, map(float, model.coef_[0]), strict=True))
        return model


def annotations_of(model: dict[str, Any]) -> pd.DataFrame:
    """The frame that the package wants; of outputs only their lengths are read."""
    return (
        pd.DataFrame(
            {
                "index": model["index"],
                "preference": model["preferences"],
                "output_1": ["x" * length for length in model["baseline_lengths"]],
                "output_2": ["x" * length for length in model["lengths"]],
                "generator_1": "baseline",
                "generator_2": "model",
                "annotator": "judge",
            }
        )
        .set_index("index", drop=False)
        .rename_axis("row")
    )


def fitted(frame: pd.DataFrame, fixed: float | None) -> tuple[dict[str, Any], _Fit]:
    """Metrics, and the fit that they are made of."""
    fit = _Fit(fixed)
    glm_winrate.fit_LogisticRegressionCV = fit
    metrics = glm_winrate.get_length_controlled_winrate(
        frame.copy(), save_weights_dir=None, is_add_glm_preference_inplace=False, is_warn_extreme_changes=False
    )
    return metrics, fit


def resampled(frame: pd.DataFrame, fixed: float, rounds: int, seed: int) -> list[float]:
    """LC on resampled instructions, with C as chosen on all of them."""
    chosen = np.random.default_rng(seed).integers(0, len(frame), size=(rounds, len(frame)))
    return [float(fitted(frame.iloc[rows], fixed)[0]["length_controlled_winrate"]) for rows in chosen]


def lc_by_c(frame: pd.DataFrame, fit: _Fit, lc: float, wanted: float, tolerance: float) -> list[list[float]]:
    """LC at the C chosen and, until it is the one wanted, at others that were to choose from, the nearest first."""
    chosen = fit.chosen[0]
    tried = [[chosen, lc]]
    for value in sorted(fit.candidates, key=lambda value: abs(np.log(value / chosen)))[1:]:
        if abs(tried[-1][1] - wanted) <= tolerance:
            break
        tried.append([value, float(fitted(frame, value)[0]["length_controlled_winrate"])])
    return tried


def score(model: dict[str, Any], rounds: int, seed: int, tolerance: float) -> dict[str, Any]:
    """All numbers of one model."""
    frame = annotations_of(model)
    metrics, fit = fitted(frame, None)
    metrics = {name: float(value) for name, value in metrics.items()}
    lc, wanted = metrics["length_controlled_winrate"], model.get("published")
    return {
        "metrics": metrics,
        "C": fit.chosen[0],
        "weights": fit.weights,
        "lc_by_C": [] if wanted is None else lc_by_c(frame, fit, lc, wanted, tolerance),
        "lc_replicates": resampled(frame, fit.chosen[0], rounds, seed) if rounds else [],
    }


def answer(request: dict[str, Any]) -> list[dict[str, Any]]:
    """All numbers of each model."""
    logging.disable(logging.WARNING)
    glm_winrate.hf_hub_download = lambda **_: request["df_gamed"]
    told = (request.get("rounds", 0), request.get("seed", 123), request.get("tolerance", 0.0))
    return [score(model, *told) for model in request["models"]]

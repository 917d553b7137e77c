"""Every field of transformers' config classes and every change of weight files: as transformers, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.fuzz.against_transformers import Change, Judge, combined_changes, field_changes, weight_changes

REFUSED = {
    *(
        "head_dim",
        "hidden_act",
        "initializer_range",
        "is_causal",
        "layer_types",
        "max_position_embeddings",
        "model_type",
    ),
    *("num_hidden_layers", "original_max_position_embeddings", "partial_rotary_factor", "per_layer_config"),
    *("rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings"),
    *("transformers_weights", "use_sliding_window"),
}
"""Fields of which some values change what transformers computes, and are refused. A field that a newer transformers
brings ends up in the findings, or here."""


def findings(changes: Iterable[Change], judge: Judge) -> list[str]:
    return [f"{change}: {problem}" for change in changes if (problem := judge(change)) is not None]


@pytest.mark.timeout(3600)
def test_every_field(tmp_path: Path) -> None:
    judge = Judge(tmp_path)
    assert not (found := findings(field_changes(), judge)), "\n".join(found)
    assert set(judge.refused) <= REFUSED, set(judge.refused) - REFUSED


@pytest.mark.timeout(3600)
def test_fields_that_decide_together(tmp_path: Path) -> None:
    assert not (found := findings(combined_changes(), Judge(tmp_path))), "\n".join(found)


def test_weight_files(tmp_path: Path) -> None:
    assert not (found := findings(weight_changes(), Judge(tmp_path))), "\n".join(found)

"""`save_to` of a policy in training: the same `.nemo` from every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo.formats.model_files import open_model
from tests.distributed.training_runs import train, weights_of
from tests.distributed.workers import run_workers


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, ()),
        (4, ("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2")),
        (2, ("model.fsdp=true",)),
    ],
    ids=["one", "tp2_pp2", "fsdp2"],
)
def test_holds_the_weights_of_the_checkpoint(world: int, layout: tuple[str, ...], tmp_path: Path) -> None:
    run, archive = tmp_path / "run", tmp_path / "policy.nemo"
    archive.write_text("an earlier one")
    run_workers(world, train, str(run), layout, str(archive))
    model = open_model(archive)
    assert model.kind == "nemo"
    expected = weights_of(run, 3)
    assert set(model.source.names()) == expected.keys()
    assert all(model.source.get(name).equal(tensor) for name, tensor in expected.items())
    tokenizer = run / "checkpoints" / "step_0000003" / "tokenizer" / "tokenizer.json"
    assert model.side_file("tokenizer.json") == tokenizer.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.nemo", "run"]

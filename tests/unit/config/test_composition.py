"""What is set on files that are composed once is what Hydra would have set, and files that change are composed anew."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from nemo_lmpo.config import recipe
from nemo_lmpo.config.recipe import compose, recipes_dir
from nemo_lmpo.errors import ConfigError


def by_hydra(name: str, overrides: list[str]) -> Any:
    """Hydra's own answer, keys of no file allowed."""
    with initialize_config_dir(config_dir=str(recipes_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra_compose(name, overrides=overrides), resolve=True)


# Overrides as users write them, and as Hydra itself wants keys that no file has.
OVERRIDES = {
    "none": ([], []),
    "values": (["optim.lr=2e-3", "model.seed=3"], ["optim.lr=2e-3", "++model.seed=3"]),
    "the_last_counts": (["optim.lr=1", "optim.lr=2"], ["optim.lr=1", "optim.lr=2"]),
    "group_of_values": (["optim.sched={warmup_fraction: 0.5}"], ["++optim.sched={warmup_fraction: 0.5}"]),
    "merged": (["model.architecture={hidden_size: 8}"], ["++model.architecture={hidden_size: 8}"]),
    "below_a_value": (["optim.lr.of=3"], ["++optim.lr.of=3"]),
    "reference": (["run_dir=${name}-${model.seed}", "model.seed=4"], ["++run_dir=${name}-4", "++model.seed=4"]),
    "quoted": (["run_dir='a=b,c'"], ["++run_dir='a=b,c'"]),
    "function": (["optim.lr=int(3.7)"], ["optim.lr=int(3.7)"]),
    "loss": (["loss.beta=7", "loss=simpo"], ["++loss.beta=7", "loss=simpo"]),
    "compat": (["compat=released_code", "loss.beta=1"], ["compat=released_code", "loss.beta=1"]),
    "taken_away": (["optim.lr=3", "~optim.lr"], ["optim.lr=3", "~optim.lr"]),
    "added": (["+optim.extra=3", "optim.extra=4"], ["+optim.extra=3", "++optim.extra=4"]),
    "hydras_own": (["hydra.run.dir=x", "model.seed=1"], ["hydra.run.dir=x", "++model.seed=1"]),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_values_are_as_hydra_sets_them(case: str) -> None:
    overrides, for_hydra = OVERRIDES[case]
    expected = by_hydra("lmpo_tiny", for_hydra)
    assert compose("lmpo_tiny", overrides) == expected
    assert compose("lmpo_tiny") == by_hydra("lmpo_tiny", []), "nothing of it stays"
    assert compose("lmpo_tiny", overrides) == expected, "also the second time"


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package's recipes that may be written to."""
    copied = Path(shutil.copytree(recipes_dir(), tmp_path / "recipes"))
    monkeypatch.setattr(recipe, "recipes_dir", lambda: copied)
    return copied


def test_files_that_change_are_composed_anew(recipes: Path) -> None:
    assert compose("simpo_tiny")["optim"]["lr"] == 1e-3
    setting = recipes / "setting" / "tiny.yaml"
    setting.write_text(setting.read_text().replace("lr: 1.0e-3", "lr: 2.0e-3"))
    assert compose("simpo_tiny")["optim"]["lr"] == 2e-3, "written again"
    (recipes / "specialization" / "ipo_tiny.yaml").write_text("# @package _global_\noptim: {lr: 3.0e-3}\n")
    assert compose("ipo_tiny")["optim"]["lr"] == 3e-3, "added"
    (recipes / "specialization" / "ipo_tiny.yaml").unlink()
    assert compose("ipo_tiny")["optim"]["lr"] == 2e-3, "taken away"


def test_a_file_that_cannot_be_read_is_told_each_time(recipes: Path) -> None:
    file = recipes / "lmpo_tiny.yaml"
    file.write_text("optim: {lr: 1\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"recipe lmpo_tiny: .*lmpo_tiny\.yaml"):
            compose("lmpo_tiny")
    file.write_text("optim: {lr: 1}\n")
    assert compose("lmpo_tiny") == {"optim": {"lr": 1}}

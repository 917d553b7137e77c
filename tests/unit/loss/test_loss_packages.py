"""A loss of another package: found by its entry point, used like the project's own, refused with a sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.config.recipe import load_recipe, recipe_names
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss import packages
from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.registry import build_loss

MODULE = """
from dataclasses import dataclass
import torch.nn.functional as F
from nemo_lmpo.loss.interface import LossOutputs
from nemo_lmpo.loss.numerics import averages
from nemo_lmpo.loss.options import PreferenceOptions
from nemo_lmpo.loss.registry import LossEntry
from nemo_lmpo.settings import setting

@dataclass(frozen=True)
class HingeConfig(PreferenceOptions):
    name: str = "hinge"
    width: float = setting(1.0, above=0)

@dataclass(frozen=True)
class Misnamed(PreferenceOptions):
    name: str = "other"

def hinge_loss(inputs, config):
    chosen, rejected = averages(inputs)
    return LossOutputs(F.relu(config.width - (chosen - rejected)), chosen, rejected)

HINGE = LossEntry(HingeConfig, hinge_loss)
MISNAMED = LossEntry(Misnamed, hinge_loss)
NOT_AN_ENTRY = hinge_loss
"""


def install(folder: Path, **points: str) -> None:
    """Losses of a package `their-losses`, as pip would install it."""
    (folder / "their_losses.py").write_text(MODULE)
    about = folder / "their_losses-1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-losses\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (about / "entry_points.txt").write_text(f"[{packages.GROUP}]\n{lines}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    packages.package_losses.cache_clear()
    packages.find_package_loss.cache_clear()
    yield tmp_path
    sys.modules.pop("their_losses", None)
    packages.package_losses.cache_clear()
    packages.find_package_loss.cache_clear()


def test_it_is_a_loss_like_any_other(folder: Path) -> None:
    install(folder, hinge="their_losses:HINGE")
    assert "hinge_llama3_8b" in recipe_names()
    assert "their_losses" not in sys.modules  # until it is asked for
    for name, overrides in (("hinge_tiny", []), ("lmpo_tiny", ["loss=hinge"]), ("lmpo_tiny", ["loss.name=hinge"])):
        config = load_recipe(name, [*overrides, "loss.width=0.5", "loss.sft_weight=0.25"])
        assert vars(config.loss) == {"name": "hinge", "width": 0.5, "sft_weight": 0.25}
    loss = build_loss(config.loss)
    sums: Any = [
        torch.tensor(values, dtype=torch.float64) for values in ([-4.0, -9.0], [-6.0, -3.0], [4.0, 3.0], [3.0, 3.0])
    ]
    # Averages -1, -3 and -2, -1: max(0, 0.5 - 1), max(0, 0.5 + 2), and a quarter of the chosen answer's likelihood.
    assert loss(LossInputs(*sums)).losses.tolist() == [0.25, 3.25]


def test_its_options_are_checked(folder: Path) -> None:
    install(folder, hinge="their_losses:HINGE")
    with pytest.raises(ConfigError, match=r"loss\.width=-1"):
        load_recipe("hinge_tiny", ["loss.width=-1"])
    with pytest.raises(ConfigError, match="Options of hinge: sft_weight, width"):
        load_recipe("hinge_tiny", ["loss.beta=1"])
    with pytest.raises(ConfigError, match=r"did you mean loss\.name=hinge\?"):
        load_recipe("lmpo_tiny", ["loss.name=hinges"])


@pytest.mark.parametrize(
    ("point", "value", "reason"),
    [
        ("hinge", "their_losses:NOTHING", "the loss hinge of the package their-losses .* cannot be imported"),
        ("hinge", "no_such_module:HINGE", "cannot be imported: .*no_such_module"),
        ("hinge", "their_losses:NOT_AN_ENTRY", "not a LossEntry"),
        ("hinge", "their_losses:MISNAMED", "its options have the name .*other.*; make them the same"),
        ("dpo", "their_losses:HINGE", "has the name of a loss of nemo_lmpo; rename it, or uninstall"),
    ],
)
def test_what_cannot_be_used_is_said(folder: Path, point: str, value: str, reason: str) -> None:
    install(folder, **{point: value})
    with pytest.raises(ConfigError, match=reason):
        load_recipe(f"{point}_tiny")
    assert load_recipe("lmpo_tiny").loss.name == "lmpo"  # others are not affected


def test_without_the_package_the_loss_is_unknown(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.name='hinge' is unknown"):
        load_recipe("lmpo_tiny", ["loss.name=hinge"])

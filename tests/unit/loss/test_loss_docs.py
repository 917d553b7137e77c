"""The documentation of the losses says what the code does."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import nemo_lmpo
from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss import options, registry
from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.margins import DEFAULT_ALPHA, DEFAULT_BETA_S
from nemo_lmpo.loss.options import (
    DEFAULT_LOG_H,
    DEFAULT_MOMENTUM,
    PAPER_STD_FLOOR,
    RELEASED_EVALUATION_GROUP_SIZE,
    RELEASED_GROUP_SIZE,
    RELEASED_STD_FLOOR,
    LMPOConfig,
)

COMMON = ("name", "sft_weight")
"""Options that stand in no row, since all losses have them."""
DOCS = Path(nemo_lmpo.__file__).parent.parent / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an installed package has no docs folder")


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_example_of_a_new_loss_works(
    make_inputs: Callable[..., LossInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "adding_a_loss.md").read_text()
    options_of, module, entry, elsewhere = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(options, "CDPOConfig", None, raising=False)  # taken away again at the end
    exec(compile(options_of, "options.py", "exec", dont_inherit=True), options.__dict__)
    monkeypatch.setitem(options.OPTIONS, "cdpo", vars(options)["CDPOConfig"])
    cdpo = types.ModuleType("cdpo")
    monkeypatch.setitem(sys.modules, "cdpo", cdpo)
    exec(compile(module, "cdpo.py", "exec", dont_inherit=True), cdpo.__dict__)
    ((name, line),) = eval("{" + entry.strip() + "}", {**cdpo.__dict__, "LossEntry": registry.LossEntry}).items()
    package = {**cdpo.__dict__, "LossEntry": registry.LossEntry}
    exec(compile(elsewhere, "losses.py", "exec", dont_inherit=True), package)
    assert package["CDPO"] == line
    monkeypatch.setitem(registry.LOSSES, name, line)
    loss = registry.build_loss(parse_loss({"name": "cdpo", "beta": 0.1, "label_smoothing": "0.2"}))
    losses = loss(make_inputs([-6.0], [-20.0], [4.0], [10.0], [-7.0], [-18.5])).losses
    # 0.1 * (1 + 1.5) = 0.25
    expected = 0.8 * math.log(1 + math.exp(-0.25)) + 0.2 * math.log(1 + math.exp(0.25))
    assert losses.item() == pytest.approx(expected)
    with pytest.raises(ConfigError, match=r"Options of cdpo: .*beta, label_smoothing"):
        parse_loss({"name": "cdpo", "gamma": 1})


def test_the_table_lists_every_loss_with_its_defaults() -> None:
    rows = {row[0]: row for row in table_rows((DOCS / "losses.md").read_text().split("## LMPO")[0]) if "`" in row[0]}
    rows.pop("`loss.name`")
    assert set(rows) == {f"`{name}`" for name in registry.LOSSES}
    for name, entry in registry.LOSSES.items():
        _, _, listed, _, reference = rows[f"`{name}`"]
        assert (reference == "yes") == entry.needs_reference
        if name == "lmpo":
            continue
        given = dict(re.findall(r"`(\w+)` ([\w.]+)", listed))
        defaults = {f.name: str(f.default).lower() for f in dataclasses.fields(entry.config) if f.name not in COMMON}
        assert given == defaults


def test_the_lmpo_table_lists_every_option() -> None:
    section = (DOCS / "losses.md").read_text().split("## LMPO")[1].split("### ")[0]
    rows = {name: row[1] for row in table_rows(section)[2:] for name in re.findall(r"`(\w+)`", row[0])}
    fields = {f.name: f.default for f in dataclasses.fields(LMPOConfig) if f.name not in COMMON}
    assert set(rows) == set(fields)
    conditional = {"alpha": DEFAULT_ALPHA, "beta_s": DEFAULT_BETA_S, "momentum": DEFAULT_MOMENTUM}
    floors, groups = re.findall(r"[\d.e-]*\d", rows["std_floor"]), re.findall(r"\d+", rows["group_size"])
    assert [float(floor) for floor in floors] == [PAPER_STD_FLOOR, RELEASED_STD_FLOOR]
    assert [int(size) for size in groups] == [RELEASED_GROUP_SIZE, RELEASED_EVALUATION_GROUP_SIZE]
    for name, default in {**fields, **conditional}.items():
        if isinstance(default, bool | str):
            assert rows[name].strip("`") == str(default).lower()
        elif default is not None:
            assert float(rows[name]) == default
    assert rows["log_h"] == rows["h"] == f"`log_h` {DEFAULT_LOG_H}"

"""Kills at every operation on files (conversions), or every other (exports): the same command completes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo.formats import outputs
from tests.system.test_killed_exports import CONVERSIONS, kill_an_export, kill_conversions, models

__all__ = ["models"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("case", "exchange"), CONVERSIONS)
def test_a_conversion_killed_at_every_operation(
    case: str, exchange: bool, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    kill_conversions(case, models, tmp_path / "place", stride=1, exchange=exchange, every=True)


@pytest.mark.timeout(3600)
def test_an_export_of_a_run_killed_at_every_other_operation(tmp_path: Path) -> None:
    # A file is three operations (open, fsync, replace), so 2 meets each kind; 1 is twenty minutes on a busy machine.
    assert kill_an_export(tmp_path / "run", stride=2, every=True) > 40

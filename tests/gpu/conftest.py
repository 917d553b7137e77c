"""GPU tests run one after another in one process, on one device; without one they are skipped before any set-up."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip at collection: a fixture that only one test's function asks for would come after those of the module."""
    own = [item for item in items if _HERE in item.path.resolve().parents]
    if not own:
        return
    import torch

    for item in own:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))

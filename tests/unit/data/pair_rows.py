"""Rows and files for tests of the data package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def message_row(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    """A row in the UltraFeedback-binarized schema."""
    user = {"role": "user", "content": prompt}
    return {
        "prompt": prompt,
        "chosen": [user, {"role": "assistant", "content": chosen}],
        "rejected": [user, {"role": "assistant", "content": rejected}],
        **more,
    }


def package_file(package: str, *parts: str) -> Path:
    """A data file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], *parts) if folders else None
    if path is None or not path.is_file():
        pytest.skip(f"needs the package {package} (tokenizer file {parts[-1]})")
    return path

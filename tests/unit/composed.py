"""Recipes that several tests look at, composed once; who changes one copies it."""

from __future__ import annotations

from functools import cache

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.schema import Config


@cache
def recipe(name: str, *overrides: str) -> Config:
    """A recipe with overrides; not to be changed."""
    return load_recipe(name, overrides)

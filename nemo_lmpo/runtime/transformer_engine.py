"""Whether Transformer Engine is here and works: asked of itself and of megatron-core, not of the file system."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nemo_lmpo.errors import first_line

DISTRIBUTIONS = ("transformer-engine", "transformer_engine_torch")
TRIED = SpecifierSet(">=2.11,<2.21")
"""Versions of which the oldest and the newest ran on both ends of megatron-core's range (tests/te_emulation), whatever
megatron-core declares; what `nemo-lmpo[gpu]` installs."""
INSTALL = (
    "pip install --no-build-isolation 'nemo-lmpo[gpu]' once torch is installed (its torch extension is compiled "
    "against the torch that is there)"
)


@dataclass(frozen=True)
class TransformerEngine:
    """What was found."""

    version: str | None = None
    """None: not installed."""
    problem: str | None = None
    """Why it cannot be used; None: it can."""
    warning: str | None = None
    """It can be used, but megatron-core declares another range of versions, and it was not tried here."""

    @property
    def usable(self) -> bool:
        """Whether layers and attention can be built with it."""
        return self.problem is None


@cache
def find_transformer_engine() -> TransformerEngine:
    """Import it and ask megatron-core whether it can use it; an installation that is broken is hidden from then on.

    Hidden, because megatron-core takes whatever can be found: with the metapackage alone, even `import
    megatron.core` would end in Transformer Engine's own error.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return TransformerEngine(problem=f"Transformer Engine is not installed ({INSTALL})")
    version = installed_version(*DISTRIBUTIONS) or "of unknown version"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        hide_transformer_engine()
        return TransformerEngine(
            version, f"Transformer Engine {version} is installed but broken: {first_line(error)} ({INSTALL})"
        )
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        return TransformerEngine(
            version,
            f"megatron-core {importlib.metadata.version('megatron-core')} cannot use Transformer Engine {version}",
        )
    declared = declared_range()
    if declared is not None and version not in declared and version not in TRIED:
        engine = importlib.metadata.version("megatron-core")
        return TransformerEngine(
            version,
            warning=f"Transformer Engine {version} is outside of what megatron-core {engine} declares ({declared})",
        )
    return TransformerEngine(version)


def leave_out_transformer_engine() -> None:
    """For CPU runs where it is installed: megatron-core would take its optimizer and norms, which need a GPU.

    Without effect once it is imported.
    """
    if "transformer_engine" not in sys.modules:
        hide_transformer_engine()


def hide_transformer_engine() -> None:
    """Make `import transformer_engine` an ImportError in this process from here on."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def declared_range() -> SpecifierSet | None:
    """The versions that the installed megatron-core declares in its extras; None where it names none."""
    for text in importlib.metadata.requires("megatron-core") or ():
        requirement = Requirement(text)
        if requirement.name == "transformer-engine" and requirement.specifier:
            requirement.specifier.prereleases = True
            return requirement.specifier
    return None


def installed_version(*distributions: str) -> str | None:
    """That of the first of these names of a package that is installed; None: none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None

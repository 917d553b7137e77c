"""Losses that other packages bring, by an entry point of the group `nemo_lmpo.losses`.

The entry point's name is the loss's name, its value the :class:`~nemo_lmpo.loss.registry.LossEntry`. A package is
imported only when its loss is asked for.
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from nemo_lmpo.errors import ConfigError, first_line, shown
from nemo_lmpo.loss.options import OPTIONS, LossOptions

if TYPE_CHECKING:
    from nemo_lmpo.loss.registry import LossEntry

GROUP = "nemo_lmpo.losses"


@functools.cache
def package_losses() -> dict[str, EntryPoint]:
    """The losses of installed packages, by name; none of them is imported."""
    return {point.name: point for point in sorted(entry_points(group=GROUP))}


def loss_names() -> list[str]:
    """Every loss: the project's own, then those of packages."""
    return [*OPTIONS, *(name for name in package_losses() if name not in OPTIONS)]


def find_options(name: str) -> type[LossOptions]:
    """The options of a loss of :func:`loss_names`.

    Raises:
        ConfigError: a package's loss cannot be used.
    """
    return find_package_loss(name).config if name in package_losses() else OPTIONS[name]


@functools.cache
def find_package_loss(name: str) -> LossEntry:
    """The loss that a package brings under this name.

    Raises:
        ConfigError: the package cannot be imported, or what it names is not a loss of that name.
    """
    from nemo_lmpo.loss.registry import LossEntry

    point = package_losses()[name]
    where = f"the loss {name} of the package {point.dist.name if point.dist else 'without a name'} ({point.value})"
    if name in OPTIONS:
        raise ConfigError(f"{where} has the name of a loss of nemo_lmpo; rename it, or uninstall the package")
    try:
        entry = point.load()
    except Exception as error:  # whatever the package's own code raises
        raise ConfigError(f"{where} cannot be imported: {first_line(error)}") from error
    if not isinstance(entry, LossEntry):
        raise ConfigError(f"{where} is {shown(entry)}, not a LossEntry of nemo_lmpo.loss.registry")
    if not (isinstance(entry.config, type) and issubclass(entry.config, LossOptions)):
        raise ConfigError(f"{where}: its options are {shown(entry.config)}, not a class that extends PreferenceOptions")
    if entry.config.name != name:
        raise ConfigError(f"{where}: its options have the name {shown(entry.config.name)}; make them the same")
    return entry

"""Every rule that needs neither data nor a GPU, applied: all violations at once, one a line.

Nothing outside of this folder refuses such a setting; training, the dry run, `slurm submit` and `compare` all apply the
same ones. A rule names the field, its value, why it cannot be, and what to do instead. What a single number or text may
be stands at its field (see :mod:`nemo_lmpo.config.schema`) and is applied by :mod:`nemo_lmpo.config.rules.bounds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nemo_lmpo.config.rules import layout as layouts
from nemo_lmpo.config.rules import settings
from nemo_lmpo.config.rules.bounds import out_of_bounds
from nemo_lmpo.config.rules.layout import ParallelLayout
from nemo_lmpo.config.schema import Config
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.formats.architecture import Architecture, check_architecture

SETTING_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    settings.names,
    settings.profile,
    settings.sources,
    settings.lengths,
    settings.schedule,
    settings.duration,
    settings.monitor,
    settings.early_stopping,
    settings.samples,
    settings.reference,
    settings.adapters,
    settings.parallelism,
    settings.fully_sharded,
    settings.allowed_changes,
)
"""Rules that look at the settings alone."""

LAYOUT_RULES: tuple[Callable[[ParallelLayout], Iterator[str]], ...] = (
    layouts.world_size,
    layouts.global_batch,
    layouts.tensor_parallel,
    layouts.pipeline,
    layouts.recompute,
    layouts.positions,
)
"""Rules that look at the model and the number of processes, too."""


def check_settings(config: Config) -> None:
    """Refuse what would fail or be wrong with any model, before one is looked for.

    Raises:
        ConfigError: with every violation, one a line.
    """
    _refuse(_in_settings(config))


def validate(config: Config, architecture: Architecture, world_size: int) -> ParallelLayout:
    """Refuse what would fail or be wrong for this model and number of processes.

    Raises:
        ConfigError: with every violation, one a line.
    """
    check_architecture(architecture)
    layout = ParallelLayout(config, architecture, world_size)
    _refuse([*_in_settings(config), *(problem for rule in LAYOUT_RULES for problem in rule(layout))])
    return layout


def _in_settings(config: Config) -> list[str]:
    problems = list(out_of_bounds(config))
    _refuse(problems)  # the other rules divide by sizes, and compare numbers
    return [problem for rule in SETTING_RULES for problem in rule(config)]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))

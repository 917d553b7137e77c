"""Every rule that needs neither data nor a GPU, applied: all violations at once, one a line.

Nothing outside of this folder refuses such a setting; training, the dry run, `slurm submit` and `compare` all apply the
same ones. A rule names the field, its value, why it cannot be, and what to do instead. What a single number or text may
be stands at its field, in :mod:`nemo_lmpo.config.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nemo_lmpo.config.coerce import as_far_as_known, raise_all
from nemo_lmpo.config.rules import layout as layouts
from nemo_lmpo.config.rules import mixtures, performance, settings
from nemo_lmpo.config.rules.layout import ParallelLayout
from nemo_lmpo.config.schema import Config
from nemo_lmpo.formats.architecture import Architecture, check_architecture
from nemo_lmpo.settings import all_out_of_bounds

__all__ = ["LAYOUT_RULES", "SETTING_RULES", "ParallelLayout", "check_settings", "problems_together", "validate"]

SETTING_RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    settings.names,
    settings.profile,
    settings.sources,
    settings.rows,
    settings.lengths,
    settings.template_date,
    settings.schedule,
    settings.amount,
    settings.duration,
    settings.timeouts,
    settings.monitor,
    settings.early_stopping,
    settings.samples,
    settings.added_tokens,
    settings.prediction,
    settings.reference,
    settings.adapters,
    settings.groups_that_are_off,
    settings.released_layout,
    settings.parallelism,
    settings.balance,
    settings.fully_sharded,
    performance.recompute_modules,
    performance.overlap_param_gather,
    performance.fp8,
    performance.tp_comm_overlap,
    performance.cpu_offload,
    settings.allowed_changes,
)
"""Rules that look at the settings alone."""

LAYOUT_RULES: tuple[Callable[[ParallelLayout], Iterator[str]], ...] = (
    layouts.world_size,
    layouts.global_batch,
    layouts.tensor_parallel,
    mixtures.experts,
    mixtures.no_experts,
    layouts.pipeline,
    layouts.recompute,
    layouts.positions,
    performance.fp8_sizes,
    performance.dense_models,
)
"""Rules that look at the model and the number of processes, too."""


def check_settings(config: Config) -> None:
    """Refuse what would fail or be wrong with any model, before one is looked for.

    Raises:
        ConfigError: with every violation, one a line.
    """
    raise_all(_in_settings(config))


def validate(config: Config, architecture: Architecture, world_size: int) -> ParallelLayout:
    """Refuse what would fail or be wrong for this model and number of processes.

    Raises:
        ConfigError: with every violation, one a line.
    """
    check_architecture(architecture)
    layout = ParallelLayout(config, architecture, world_size)
    raise_all([*_in_settings(config), *(problem for rule in LAYOUT_RULES for problem in rule(layout))])
    return layout


def problems_together(config: Config) -> list[str]:
    """A sentence for all settings that do not go together; refused ones are passed over."""
    return [problem for rule in SETTING_RULES for problem in as_far_as_known(rule(config))]


def _in_settings(config: Config) -> list[str]:
    raise_all(list(all_out_of_bounds(config)))  # the rules divide by sizes; programs make configurations, too
    return problems_together(config)

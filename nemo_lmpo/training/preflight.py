"""Whether a run can start: everything that can be seen before torch is imported and anything is written.

Training, the dry run, `slurm submit` and `compare --list` all go through here, so that what one of them calls valid
is valid for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.rules import ParallelLayout, check_settings, validate
from nemo_lmpo.data.first_look import look_at_data, look_at_tokenizer
from nemo_lmpo.data.read import BUILTIN_PREFIX
from nemo_lmpo.formats.start_model import StartModel
from nemo_lmpo.training.added_tokens import with_added_tokens
from nemo_lmpo.training.start_model import find_start_model

if TYPE_CHECKING:
    from nemo_lmpo.config.schema import Config


@dataclass(frozen=True)
class Preflight:
    """A run that may start."""

    layout: ParallelLayout
    base: StartModel
    run: RunDirectory | None
    """None: the run will get a directory of its own."""
    unseen: tuple[str, ...]
    """Hub names that only a start can look at."""
    rows: tuple[str, ...] = ()
    """What there is to say of how the first rows are laid, by line."""


def preflight(config: Config, world_size: int, *, fetch: bool, owns_directory: bool = True) -> Preflight:
    """Check a run as far as it can be checked without a GPU and without reading all data.

    Args:
        config: a configuration of :func:`nemo_lmpo.config.recipe.load_recipe`.
        world_size: processes of the run.
        fetch: bring a hub model to this machine; without, the recipe's expected architecture is taken for its.
        owns_directory: whether `run_dir` is where the run will write (a sweep's runs get directories of their own).

    Raises:
        UserError: settings, model, tokenizer, template, data or run directory cannot be used.
    """
    check_settings(config)
    base = find_start_model(config.model, fetch=fetch)
    if fetch or Path(base.tokenizer).is_dir() or base.tokenizer.startswith(BUILTIN_PREFIX):
        trust = config.model.trust_remote_code
        base = with_added_tokens(base, config.data.add_special_tokens, trust_remote_code=trust)
    layout = validate(config, base.architecture, world_size)
    run = RunDirectory(config) if owns_directory else None
    encoder = look_at_tokenizer(
        config.data,
        base.tokenizer,
        vocab_size=base.architecture.vocab_size,
        trust_remote_code=config.model.trust_remote_code,
        template=run.kept_template() if run is not None else None,
    )
    unseen, rows = look_at_data(config.data, encoder, config.loss.takes)
    if run is not None:
        run.check_owner()
    names = (*unseen, *(() if encoder is not None else (base.tokenizer,)))
    return Preflight(layout, base, run, names, tuple(rows))

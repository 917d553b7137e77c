"""Which runs a comparison needs; runs that several suites share are made once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.config.mode import split_mode
from nemo_lmpo.config.recipe import config_as_dict, load_recipe
from nemo_lmpo.config.rules import check_settings
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.paper.comparison.identity import identity
from nemo_lmpo.paper.comparison.scales import Scale
from nemo_lmpo.paper.comparison.suites import START, Suite, Variant
from nemo_lmpo.training.preflight import preflight
from nemo_lmpo.training.start_model import is_known

FIRST_SEED = 42
MEASURED_FILE = "measured.json"


@dataclass(frozen=True)
class RunPlan:
    """One training run."""

    variant: Variant
    recipe: str
    overrides: tuple[str, ...]
    seed: int
    directory: Path
    devices: int

    @property
    def finished(self) -> bool:
        """Whether it was trained and measured."""
        return (self.directory / MEASURED_FILE).is_file()

    def arguments(self) -> list[str]:
        """For `nemo_lmpo.train`."""
        return ["--config-name", self.recipe, *self.overrides, f"model.seed={self.seed}", f"run_dir={self.directory}"]

    def torchrun_arguments(self) -> list[str]:
        """For `torchrun`: the same on the recipe's number of processes."""
        return ["--nproc-per-node", str(self.devices), "-m", "nemo_lmpo.train", *self.arguments()]

    @property
    def start_model(self) -> Path:
        """Where the weights go, as a Hugging Face directory, if other runs start from them."""
        return self.directory / "hf"


def start_run(scale: Scale, root: Path) -> RunPlan | None:
    """The SFT run that makes the start model, where the scale has none of its own."""
    if not scale.start:
        return None
    return _plan(Variant("start", "sft"), scale.recipe("sft"), scale.start, root / "start")


def plan_runs(
    suites: Sequence[Suite], scale: Scale, root: Path, *, seeds: int, start_model: Path | None, extra: Sequence[str]
) -> dict[tuple[Variant, int], RunPlan]:
    """The run of each variant and seed.

    Args:
        suites: what is compared.
        scale: how large.
        root: where runs lie.
        seeds: how many orders of the data; the start model counts once, as its run does not train.
        start_model: weights that all runs start from; None: the recipe's.
        extra: the user's own overrides of every run.
    """
    common = [*scale.overrides, *extra]
    if start_model is not None:
        common.insert(0, f"model.restore_from_path={start_model}")
    runs: dict[tuple[Variant, int], RunPlan] = {}
    for variant in dict.fromkeys(variant for suite in suites for variant in suite.variants):
        overrides = (*common, *variant.overrides)
        first = _plan(variant, scale.recipe(variant.method), overrides, root / variant.method)
        for seed in range(FIRST_SEED, FIRST_SEED + (1 if variant == START else seeds)):
            runs[variant, seed] = dataclasses.replace(
                first, seed=seed, directory=first.directory.with_name(f"seed{seed}")
            )
    return runs


def _plan(variant: Variant, recipe: str, overrides: tuple[str, ...], beginning: Path) -> RunPlan:
    """The run of the first seed, in a directory whose name begins so."""
    mode, settings = split_mode(overrides)
    if mode.dry_run:
        raise ConfigError(
            f"dry_run={mode.dry_run} trains nothing to compare; leave it out, or see the runs with --list"
        )
    config = load_recipe(recipe, settings)
    devices = config.trainer.devices * config.trainer.num_nodes
    if is_known(config.model):
        # Whose run it is, a directory's name tells: it holds a hash of what decides a run.
        preflight(config, devices, fetch=False, owns_directory=False)
    else:
        check_settings(config)
    directory = Path(f"{beginning}-{identity(config_as_dict(config))}") / f"seed{FIRST_SEED}"
    return RunPlan(variant, recipe, overrides, FIRST_SEED, directory, devices)

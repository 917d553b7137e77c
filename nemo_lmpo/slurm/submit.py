"""Validate a recipe for the GPUs of a job, and submit the job."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.errors import ConfigError
from nemo_lmpo.runtime.command import answer
from nemo_lmpo.slurm.cluster import read_settings, settings_file, templates_dir

# As in slurm/common.sh: values separated by commas, without brackets or quotes.
_SEVERAL_VALUES = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=[^\[\]\"'{}]*,[^\[\]\"'{}]*")


@dataclass(frozen=True)
class Submission:
    """What the user asks for."""

    recipe: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 4
    config_dir: Path | None = None
    time_limit: str | None = None
    sbatch_options: tuple[str, ...] = ()
    validate: bool = True
    """Before submitting; without, only the job itself finds what is wrong."""

    def __post_init__(self) -> None:
        """Raises ConfigError for numbers below 1, and for a sweep's values that are empty."""
        for name, number in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if number < 1:
                raise ConfigError(f"{name}={number} must be at least 1")
        for override in filter(_SEVERAL_VALUES.fullmatch, self.overrides):
            key, _, values = override.partition("=")
            if "\n" in values or "" in values.split(","):
                raise ConfigError(f"{key} has an empty value or a line break among its values; correct it")

    def combinations(self) -> list[list[str]]:
        """The overrides of every run of a sweep, in the order of the array's tasks; one list without a sweep."""
        fixed = [override for override in self.overrides if not _SEVERAL_VALUES.fullmatch(override)]
        swept = [override.partition("=") for override in self.overrides if _SEVERAL_VALUES.fullmatch(override)]
        choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in swept]
        # The first setting varies fastest.
        return [[*reversed(chosen), *fixed] for chosen in itertools.product(*reversed(choices))]

    @property
    def is_sweep(self) -> bool:
        """Whether some setting has several values."""
        return len(self.combinations()) > 1


def submit(request: Submission, *, print_only: bool = False) -> int:
    """Validate, print the sbatch line, submit; returns the exit status.

    Raises:
        ConfigError: the recipe does not fit the GPUs, or sbatch refuses.
    """
    templates = templates_dir()
    settings = settings_file(templates)
    variables = read_settings(settings) if settings is not None else {}
    answer(check(request) if request.validate else "Not validated.")
    command = sbatch_command(request, templates, variables)
    shown = shlex.join(command)
    if settings is not None:
        shown = f". {shlex.quote(str(settings))} && {shown}"
    answer(shown)
    if print_only:
        return 0
    job_id = _run_sbatch(command, variables)
    name = Path(request.recipe).stem
    log = f"{name}-{job_id}_*.log" if request.is_sweep else f"{name}-{job_id}.log"
    print(f"submitted job {job_id}; its log: {log}; its state: python -m nemo_lmpo.slurm status")  # noqa: T201
    return 0


def check(request: Submission) -> str:
    """The dry run of the request's (first) run, after validating all of them.

    Raises:
        UserError: what training would refuse: settings, layout, model, data, or another run's directory.
        ConfigError: this Python has not the packages that validation needs.
    """
    try:
        return _check(request)
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(
            f"validation needs {package}, which {sys.executable} does not have; use the Python of the environment that "
            "trains (NEMO_LMPO_VENV in slurm/cluster.env), or submit without validation: --no-validate"
        ) from None


def _check(request: Submission) -> str:
    from nemo_lmpo.config.mode import split_mode
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.sizing.describe_run import describe
    from nemo_lmpo.training.preflight import preflight

    first = None
    for overrides in request.combinations():
        _, settings = split_mode(overrides)  # the job's own command line keeps its mode
        config = load_recipe(request.recipe, settings, config_dir=request.config_dir)
        config.trainer.devices, config.trainer.num_nodes = request.gpus_per_node, request.nodes
        checked = preflight(
            config, request.nodes * request.gpus_per_node, fetch=False, owns_directory=not request.is_sweep
        )
        first = checked if first is None else first
    assert first is not None
    return describe(first.layout, unseen=first.unseen, rows=first.rows)


def sbatch_command(request: Submission, templates: Path, variables: Mapping[str, str]) -> list[str]:
    """The command line for sbatch."""
    gpu_type = variables.get("NEMO_LMPO_GPU_TYPE") or os.environ.get("NEMO_LMPO_GPU_TYPE")
    gpus = f"{gpu_type}:{request.gpus_per_node}" if gpu_type else str(request.gpus_per_node)
    template, array = "train.sbatch" if request.nodes == 1 else "train_multinode.sbatch", []
    if request.is_sweep:
        template, array = "sweep.sbatch", [f"--array=0-{len(request.combinations()) - 1}"]
    options = [
        f"--job-name={Path(request.recipe).stem}",
        f"--nodes={request.nodes}",
        f"--gpus-per-node={gpus}",
        f"--ntasks-per-node={request.gpus_per_node}",
        *array,
    ]
    if request.time_limit is not None:
        options.append(f"--time={request.time_limit}")
    here = Path("slurm")
    if not (here.exists() and here.samefile(templates)):
        # The job looks for the templates' common part in the folder that it was submitted from.
        if "," in str(templates):
            raise ConfigError(f"{templates}: sbatch takes no path with a comma; move the templates")
        options.append(f"--export=ALL,NEMO_LMPO_SLURM_DIR={templates}")
        here = templates
    from nemo_lmpo.config.recipe import recipe_file

    # The job may start elsewhere than where its recipe's path was given.
    file = None if request.config_dir is not None and "/" not in request.recipe else recipe_file(request.recipe)
    arguments = [request.recipe if file is None else str(file.resolve())]
    if request.config_dir is not None:
        arguments += ["--config-dir", str(request.config_dir.resolve())]
    return ["sbatch", *options, *request.sbatch_options, str(here / template), *arguments, *request.overrides]


def _run_sbatch(command: list[str], variables: Mapping[str, str]) -> str:
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on this machine; run this on a login node of the cluster, or add --print")
    done = subprocess.run(
        [command[0], "--parsable", *command[1:]],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise ConfigError(f"sbatch refused the job ({reason}); correct slurm/cluster.env or the options above")
    return done.stdout.strip().split(";")[0]

"""Place of this process in its job, as the launcher tells it. Imports no torch, so commands can ask early."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_lmpo.errors import ConfigError


@dataclass(frozen=True)
class LaunchInfo:
    """Place of this process in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store_path: str | None = None
    """A file through which processes of one machine find each other; None: `MASTER_ADDR` and `MASTER_PORT`."""

    @property
    def is_main(self) -> bool:
        """Whether this process talks to the user and writes files."""
        return self.rank == 0


def read_launch_info(environ: Mapping[str, str] | None = None) -> LaunchInfo:
    """From torchrun's variables, else from Slurm's (`srun` without torchrun), else a single process.

    Raises:
        ConfigError: the variables of a launcher are incomplete.
    """
    environ = os.environ if environ is None else environ
    if "WORLD_SIZE" in environ:
        try:
            rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        except (KeyError, ValueError) as error:
            raise ConfigError(f"WORLD_SIZE is set but RANK is missing or no number ({error}); use torchrun") from None
        local_rank = int(environ.get("LOCAL_RANK", 0))
        return LaunchInfo(rank, world_size, local_rank, int(environ.get("LOCAL_WORLD_SIZE", world_size)))
    # Only srun sets this. A shell inside an allocation, or a step of one task, is a single process.
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        return _from_srun(environ, tasks)
    return LaunchInfo()


def several_ranks(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher started more processes than this one."""
    environ = os.environ if environ is None else environ
    return environ.get("WORLD_SIZE", environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1"


def _from_srun(environ: Mapping[str, str], tasks: int) -> LaunchInfo:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID") if name not in environ]
    if missing:
        # Each task alone would train the same run and overwrite the others' files.
        raise ConfigError(
            f"srun started {tasks} tasks, but {', '.join(missing)} is not set; submit slurm/train.sbatch, export the "
            f"first node's name and a free port, or use torchrun"
        )
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    return LaunchInfo(int(environ["SLURM_PROCID"]), tasks, int(environ["SLURM_LOCALID"]), max(tasks // nodes, 1))


_OPEN_FILES = 4096
FEWEST_OPEN_FILES = 256
"""What connections to other ranks and a background checkpoint need, with room to spare."""


def refuse_few_open_files(world_size: int) -> None:
    """Raise the limit on open files as far as this process may, which many ranks need.

    Raises:
        ConfigError: even the highest limit is too low for several processes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if world_size > 1 and hard != resource.RLIM_INFINITY and hard < FEWEST_OPEN_FILES:
        raise ConfigError(
            f"only {hard} files may be open at a time, and {world_size} processes need {FEWEST_OPEN_FILES}; raise the "
            f"limit, for example by ulimit -n {FEWEST_OPEN_FILES}"
        )

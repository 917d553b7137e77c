"""Train with NeMo-Run: `python launchers/nemo_run_train.py RECIPE [KEY=VALUE ...] --nodes 2 --account A --partition P`.

Without `--account` the run is one of this machine. Needs `pip install nemo-run`. On Slurm, `nemo-lmpo slurm submit`
does more: its jobs stop in time, requeue themselves and resume.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nemo_run as run


def executor(options: argparse.Namespace) -> run.Executor:
    """Where the run happens: this machine, or a Slurm cluster that this machine submits to."""
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if options.account is None:
        return run.LocalExecutor(ntasks_per_node=options.devices, launcher="torchrun", env_vars=variables)
    return run.SlurmExecutor(
        account=options.account,
        packager=run.Packager(),  # the package is installed there, or in the image
        partition=options.partition,
        nodes=options.nodes,
        # torchrun starts one process per GPU, and Slurm one torchrun per node.
        ntasks_per_node=1,
        torchrun_nproc_per_node=options.devices,
        gpus_per_node=options.devices,
        time=options.time,
        mem="0",
        exclusive=True,
        container_image=options.image,
        container_mounts=options.mount,
        tunnel=run.LocalTunnel(job_dir=str(Path("runs/nemo_run").absolute())),
        launcher="torchrun",
        env_vars=variables,
    )


def main() -> None:
    """Read the command line and start or submit the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4, help="processes of a node, one per GPU (default: 4)")
    parser.add_argument("--account", help="of the Slurm cluster; unset: run on this machine")
    parser.add_argument("--partition")
    parser.add_argument("--time", default="24:00:00", help="limit of the job (default: 24:00:00)")
    parser.add_argument("--image", help="container for pyxis")
    parser.add_argument("--mount", action="append", default=[], metavar="FROM:TO")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    options = parser.parse_intermixed_args()
    # NeMo-Run changes the working directory, which a run directory is relative to.
    placed = any(one.startswith("run_dir=") for one in options.overrides)
    where = [] if placed else [f"run_dir={Path('runs', options.recipe).absolute()}"]
    arguments = ["--config-name", options.recipe, *options.overrides, *where]
    train = run.Script(path="nemo_lmpo.train", m=True, entrypoint="python", args=arguments)
    run.run(train, executor=executor(options), name=options.recipe, dryrun=options.dry_run, direct=False)


if __name__ == "__main__":
    main()

"""Host memory that saving and resuming take with the distributed optimizer, over two data-parallel processes.

    python benchmarks/checkpoint_memory.py [--hidden 768 --layers 8]

Two processes train one step of `lmpo_tiny` scaled up and save; two new ones resume. Shown is the most memory in use
meanwhile above that before (VmHWM, which is reset in between), for the state as it is saved now and for megatron-core's
gathered form (`fully_reshardable`), which was used before. Resuming includes the optimizer's own state, which it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 2.0**30


def build_parser() -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="hidden size (default: 768)")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="layers (default: 8)")
    parser.add_argument("--precision", default="32", choices=["32", "bf16"], help="of training (default: 32)")
    parser.add_argument("--form", choices=["boxes", "gathered"], help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", help=argparse.SUPPRESS)
    return parser


def in_use() -> int:
    """Resident bytes of this process."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def most_above(action: Callable[[], Any]) -> int:
    """Bytes that ``action`` had in use at most, above those before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = in_use()
    action()
    return _status("VmHWM") - before


def gather_as_before() -> None:
    """Let sessions save and load the optimizer through megatron-core's gathered form."""
    from nemo_lmpo.checkpoint import optimizer_state

    form = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
    loading: list[bool] = []

    def make_state(inner: Any) -> None:
        loading.append(True)
        inner.init_state_fn(inner.optimizer, inner.config)

    def state_of(inner: Any, model_state: dict[str, Any]) -> Any:
        return inner.sharded_param_state_fully_reshardable(model_state, bool(loading), form)

    def load(inner: Any, tensors: dict[int, dict[str, Any]]) -> None:
        for state in inner.optimizer.state.values():
            state.pop("step", None)
        inner.load_parameter_state_from_fully_reshardable(
            {number: {"fp32_param": values["param"], **values} for number, values in tensors.items()}
        )

    for name, function in (("_make_state", make_state), ("_distributed_state", state_of), ("_load_distributed", load)):
        setattr(optimizer_state, name, function)


def measure(options: argparse.Namespace) -> None:
    """One process of one form; rank 0 prints every rank's figures."""
    import torch

    from nemo_lmpo.checkpoint.agreement import from_all_ranks
    from nemo_lmpo.checkpoint.progress import Progress
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.runtime.launch import read_launch_info
    from nemo_lmpo.training.session import open_session

    if options.form == "gathered":
        gather_as_before()
    config = load_recipe(
        "lmpo_tiny",
        [
            f"model.architecture.hidden_size={options.hidden}",
            f"model.architecture.intermediate_size={options.hidden * 8 // 3 // 8 * 8}",
            f"model.architecture.num_hidden_layers={options.layers}",
            f"trainer.precision={options.precision}",
            "model.global_batch_size=4",
            "data.validation.path=null",
            "optim.use_distributed_optimizer=true",
            "trainer.num_threads=1",
            f"run_dir={options.run_dir}",
        ],
    )
    with open_session(config, read_launch_info()) as session:
        if session.run.checkpoints.exists():
            most = most_above(session.checkpoints.load_newest)
        else:
            session.trainer().train_step(0)
            statistics = session.policy.statistics
            state = Progress(step=1, statistics=statistics.state_dict() if statistics is not None else None)
            most = most_above(lambda: session.checkpoints.save(state))
        parameters = sum(torch.numel(weight) for chunk in session.policy.models for weight in chunk.parameters())
        ranks = from_all_ranks(most)
        if session.launch.is_main:
            print(json.dumps({"form": options.form, "parameters": parameters, "ranks": ranks}), flush=True)


def main() -> None:
    """Measure both forms and print a table."""
    options = build_parser().parse_args()
    if options.form:
        measure(options)
        return
    print(f"{'form':<10} {'parameters':>12} {'rank':>5} {'saving GiB':>11} {'resuming GiB':>13}")
    for form in ("gathered", "boxes"):
        with tempfile.TemporaryDirectory() as directory:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            command = [*launcher, __file__, *sys.argv[1:], f"--form={form}", f"--run-dir={directory}/run"]
            saved, resumed = (launch(command) for _ in range(2))
        for rank, (saving, loading) in enumerate(zip(saved["ranks"], resumed["ranks"], strict=True)):
            print(f"{form:<10} {saved['parameters']:>12,} {rank:>5} {saving / GIB:>11.2f} {loading / GIB:>13.2f}")


def launch(command: list[str]) -> dict[str, Any]:
    """Run two processes; what rank 0 found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"form"')))
    return found


if __name__ == "__main__":
    main()

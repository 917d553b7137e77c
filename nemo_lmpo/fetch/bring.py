"""What a configuration names on the hub, fetched by the hub's own client: what is here and whole is not asked again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_lmpo.config.schema import Config
from nemo_lmpo.data.progress import on_terminal, progress_bars
from nemo_lmpo.data.read import BUILTIN_PREFIX, is_hub_dataset
from nemo_lmpo.errors import DataError, first_line
from nemo_lmpo.formats.find_model import model_patterns
from nemo_lmpo.formats.sidecars import TOKENIZER_PATTERNS
from nemo_lmpo.runtime.files import is_hub_name
from nemo_lmpo.runtime.hub_errors import hub_errors


@dataclass(frozen=True)
class Need:
    """A repository of the hub."""

    kind: str
    """`model`, `tokenizer` or `dataset`."""
    name: str
    patterns: tuple[str, ...] = ()
    """The files that are needed; none: all."""


@dataclass(frozen=True)
class Brought:
    """A repository's files on this machine."""

    folder: Path
    files: int
    size: int
    """Bytes of all files."""


def needs_of(config: Config) -> tuple[list[Need], list[str]]:
    """The repositories that a run needs, each once, and the paths that are on this machine already.

    Raises:
        DataError: a path is neither here nor a name on the hub.
    """
    found: dict[tuple[str, str], Need] = {}
    here: list[str] = []
    models = (
        (config.model.restore_from_path, "model", tuple(model_patterns())),
        (config.model.tokenizer, "tokenizer", tuple(TOKENIZER_PATTERNS)),
    )
    for name, kind, patterns in models:
        if name is None or name.startswith(BUILTIN_PREFIX) or _is_here(name, here):
            continue
        if not is_hub_name(name):
            raise DataError(f"{kind} {name} is neither on this machine nor a name on the hub; correct the path")
        found.setdefault(("model", name), Need(kind, name, patterns))  # a model brings its tokenizer
    for path in [*config.data.train.paths, *config.data.validation.paths]:
        if path.startswith(BUILTIN_PREFIX) or _is_here(path, here):
            continue
        if not is_hub_dataset(path):
            raise DataError(f"data {path} is neither on this machine nor a name on the hub; correct the path")
        name = path.partition(":")[0]
        found.setdefault(("dataset", name), Need("dataset", name))
    return list(found.values()), list(dict.fromkeys(here))


def _is_here(path: str, here: list[str]) -> bool:
    try:
        exists = Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long a name, no home, a NUL: no file
        exists = False
    if exists:
        here.append(path)
    return exists


def bring(need: Need, cache: Path | None) -> Brought:
    """Fetch what of a repository is not here yet.

    Args:
        need: the repository.
        cache: a folder of the form of the hub's cache; None: the cache itself.

    Raises:
        DataError: it cannot be fetched, or has none of the files.
    """
    from huggingface_hub import snapshot_download

    try:
        with progress_bars(show=on_terminal()):
            found = snapshot_download(
                need.name,
                repo_type="dataset" if need.kind == "dataset" else "model",
                allow_patterns=list(need.patterns) or None,
                cache_dir=cache,
            )
    except hub_errors() as error:
        raise DataError(
            f"{need.kind} {need.name} cannot be fetched from the hub ({first_line(error)}); check the name, your login "
            "and the network; what was fetched is kept, and the same command resumes"
        ) from None
    folder = Path(found)
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise DataError(f"{need.kind} {need.name} has no file that is needed on the hub; check the name")
    return Brought(folder, len(files), sum(path.stat().st_size for path in files))

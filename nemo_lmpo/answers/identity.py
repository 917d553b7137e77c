"""What answers are made of: hashes of a model's weights, and the note in a folder that only the same command shares."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.errors import ConfigError, DataError
from nemo_lmpo.formats.export_record import check_weights
from nemo_lmpo.runtime.files import file_stamp, read_json, write_json

if TYPE_CHECKING:
    from nemo_lmpo.formats.model_files import ModelFiles

_WEIGHTS_FILE = "weights.json"


def weights_hash(
    files: ModelFiles, path: Path, folder: Path, progress: Callable[[int], object], kept_as: str = _WEIGHTS_FILE
) -> str:
    """SHA-256 of all tensors under their Hugging Face names, the same in whatever form the model is stored.

    Kept in ``folder``, so that a command that resumes does not read the weights again unless they changed.
    """
    stamp = file_stamp(path)
    kept = folder / kept_as
    if kept.exists():
        before = read_json(kept)
        if before["files"] == stamp:
            return str(before["sha256"])
    check_weights(path)
    digest = _hash_tensors(files, progress)
    write_json(kept, {"files": stamp, "sha256": digest})
    return digest


def _hash_tensors(files: ModelFiles, progress: Callable[[int], object]) -> str:
    import torch

    from nemo_lmpo.formats.conversion import tensor_names

    digest = hashlib.sha256()
    for name in sorted(tensor_names(files)):
        tensor = files.source.get(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        progress(1)
    return digest.hexdigest()


_ANEW = "choose another --output, or remove that folder to start anew"


def claim_folder(
    folder: Path,
    name: str,
    identity: Mapping[str, Any],
    what: str = "an evaluation",
    *,
    begun: bool = True,
    remedy: str = _ANEW,
) -> None:
    """Note what a folder's stage is made of, or see that it is the same as before.

    Args:
        folder: of the command's output.
        name: of the file in it that holds the note.
        identity: what the stage is made of.
        what: the folder holds, for the message.
        begun: whether anything of the stage is there. If not, another command's note does not bind this one.
        remedy: what a user can do, for the message.

    Raises:
        ConfigError: another one was begun there; names what differs.
    """
    path = folder / name
    wanted: dict[str, Any] = json.loads(json.dumps(identity))  # tuples are lists in files
    if begun and path.exists():
        before = read_json(path)
        differing = [key for key in sorted(before.keys() | wanted.keys()) if before.get(key) != wanted.get(key)]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"{folder} holds {what} with {key} {_short(before.get(key))}, this one has "
                f"{_short(wanted.get(key))}; {remedy}"
            )
        return
    write_json(path, wanted)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_one_bos(prompts: Mapping[str, Sequence[int]], bos: int | None, noun: str) -> None:
    """Refuse prompts with two BOS in front: models were not trained on that, and answer otherwise.

    Raises:
        DataError: names the first.
    """
    for name, ids in prompts.items():
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise DataError(f"the prompt of {noun} {name} begins with two BOS tokens; correct the chat template")


def own_packages() -> dict[str, str]:
    """Versions of this environment's packages that decide answers."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("nemo-lmpo", "torch", "transformers", "tokenizers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

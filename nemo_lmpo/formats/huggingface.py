"""Weights of a Hugging Face directory, read and written: one safetensors file, or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_lmpo.errors import CheckpointError, counted
from nemo_lmpo.formats.architecture import parse_json
from nemo_lmpo.formats.families import ExpertNames
from nemo_lmpo.formats.fused_experts import Selection, separate_experts
from nemo_lmpo.formats.mapping import HF_EMBEDDING, HF_OUTPUT
from nemo_lmpo.formats.safetensors_file import write_tensors
from nemo_lmpo.formats.source import TensorSource, get_fitting

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5_000_000_000
"""Files grow to at most this size, unless one tensor is larger (as transformers does by default)."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point formats of safetensors that weights may have."""
_WITHOUT_PREFIX = re.compile(r"embed_tokens\.|layers\.\d+\.|norm\.")


class HuggingFaceSource(TensorSource):
    """Tensors of a directory with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    What lies there is taken as transformers takes it: the single file if there is one, whatever index lies beside it;
    every tensor of the files that the index names, wherever it says they are; and names without `model.`, as a decoder
    without its output layer is saved.

    Headers are read and checked at once, tensors when asked for: :meth:`get` maps the file into memory, so a
    slice of the result reads only its own pages, and the mapping goes when the tensor does.

    Args:
        directory: where the files are.
        tied: the output layer is the embedding, and may be the one that is stored.
        experts: of a mixture: all experts of a layer may be stored as one tensor, of which each is a slice.

    Raises:
        CheckpointError: no weights, a missing or truncated file, or two different tensors of one name.
    """

    def __init__(self, directory: Path, *, tied: bool = False, experts: ExpertNames | None = None) -> None:
        super().__init__(str(directory), {})
        self._directory = directory
        self._experts = experts
        self._places: dict[str, tuple[Path, str, Selection]] = {}
        """File, the name there, and what of that tensor."""
        self._dtypes: dict[str, torch.dtype] = {}
        if (directory / SINGLE_FILE).is_file():
            self._add_file(directory / SINGLE_FILE)
        elif (directory / INDEX_FILE).is_file():
            for path in _indexed_files(directory / INDEX_FILE):
                self._add_file(path)
        else:
            raise CheckpointError(self._nothing_found())
        if tied and HF_OUTPUT in self._places and HF_EMBEDDING not in self._places:
            self._places[HF_EMBEDDING] = self._places.pop(HF_OUTPUT)
            self._shapes[HF_EMBEDDING] = self._shapes.pop(HF_OUTPUT)
            self._dtypes[HF_EMBEDDING] = self._dtypes.pop(HF_OUTPUT)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in the file's header."""
        return self._dtypes[name]

    def get(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file."""
        # Opened for each tensor: a mapping that lives on keeps every page it was read through resident.
        return self._read(*self._places[name])

    @staticmethod
    def _read(path: Path, stored: str, selection: Selection) -> Tensor:
        with _open(path) as file:
            tensor: Tensor = file.get_tensor(stored)
            return tensor[selection]

    def _nothing_found(self) -> str:
        if not self._directory.is_dir():
            return f"{self._directory} is not a directory; give a Hugging Face model directory"
        pickled = sorted(path.name for path in self._directory.glob("*.bin"))
        if pickled:
            return (
                f"{self._directory} holds pickled weights only ({', '.join(pickled)}), which are not read because "
                "unpickling can run code; save the model as safetensors first"
            )
        return f"{self._directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face model directory"

    def _add_file(self, path: Path) -> None:
        with _open(path) as file:
            for stored in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                view = file.get_slice(stored)
                kind = view.get_dtype()
                if kind not in DTYPES:
                    raise CheckpointError(
                        f"{path}: {stored} is {kind}, which is not supported; convert the model to one of "
                        f"{', '.join(DTYPES)} first"
                    )
                for name, selection, shape in self._tensors_in(_full_name(stored), tuple(view.get_shape())):
                    self._add(name, (path, stored, selection), shape, DTYPES[kind])

    def _tensors_in(self, name: str, shape: tuple[int, ...]) -> Iterable[tuple[str, Selection, tuple[int, ...]]]:
        return [(name, (), shape)] if self._experts is None else separate_experts(name, shape, self._experts)

    def _add(self, name: str, place: tuple[Path, str, Selection], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if name in self._places and not torch.equal(self.get(name), self._read(*place)):
            raise CheckpointError(
                f"{place[0]} holds another {name} than {self._places[name][0].name} ({self._places[name][1]}); "
                "remove the file that does not belong to the model"
            )
        self._places[name], self._shapes[name], self._dtypes[name] = place, shape, dtype


def _full_name(stored: str) -> str:
    """The name of a tensor in the whole model, where transformers adds or removes `model.`."""
    if _WITHOUT_PREFIX.match(stored):
        return f"model.{stored}"
    return HF_OUTPUT if stored == f"model.{HF_OUTPUT}" else stored


def _indexed_files(index: Path) -> list[Path]:
    """The files that an index names; what it says of the tensors in them does not count."""
    try:
        weight_map = parse_json(index.read_bytes(), str(index))["weight_map"]
        files = sorted({str(file) for file in weight_map.values()})
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is not a safetensors index ({type(error).__name__}: {error}); restore the file"
        ) from None
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{index} names files outside its directory: {', '.join(outside)}; restore the file")
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {counted(len(absent), 'missing file')}: {', '.join(absent)}; download the model again"
        )
    return [index.parent / file for file in files]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}); download or copy it again"
        ) from None


def write_safetensors(
    directory: Path,
    source: TensorSource,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, str]:
    """Write all tensors of ``source`` in ``dtype``; two of them are in memory at a time, beside what the source keeps.

    Returns:
        The checksum of each file, as :func:`~nemo_lmpo.runtime.files.file_checksum` gives it.

    Raises:
        CheckpointError: a file cannot be written, for example because the disk is full; or a number of the source is
            not finite, or ``dtype`` does not hold it.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {name: torch.empty(source.shape(name), dtype=dtype, device="meta") for name in source.names()}
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_bytes)
    checksums = {}
    for file, names in shards.filename_to_tensors.items():
        tensors = ((name, get_fitting(source, name, dtype).to(dtype)) for name in sorted(names))
        checksums[file] = write_tensors(directory / file, {name: sizes[name] for name in names}, tensors, progress)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": dict(sorted(shards.tensor_to_filename.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return checksums

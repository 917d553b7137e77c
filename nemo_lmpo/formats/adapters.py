"""Checkpoints that hold adapters only: what they say of themselves, the merged model, PEFT's form.

Beside the tensors (``lora.layers.N.q_proj.lora_A`` ...) lies `adapter.json`, which names the base by path and hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
from nemo_lmpo.formats.find_model import hub_name_of
from nemo_lmpo.formats.lora_targets import ATTENTION, PROJECTIONS, hf_module, hf_projection
from nemo_lmpo.formats.peft_files import PEFT_CONFIG, PEFT_WEIGHTS
from nemo_lmpo.formats.source import TensorSource
from nemo_lmpo.runtime import run_files

PREFIX = "model.lora."


@dataclass(frozen=True)
class AdapterDescription:
    """What `adapter.json` holds."""

    rank: int
    alpha: float
    dropout: float
    projections: tuple[str, ...]
    """In PEFT's names."""
    base: str | None
    """Path or hub name of the base; None: random weights of ``seed``."""
    seed: int
    fingerprint: str
    """Hash of the base's weights (:func:`nemo_lmpo.formats.fingerprint.weights_fingerprint`)."""

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank


def adapter_json(description: AdapterDescription) -> str:
    """The content of `adapter.json`."""
    return json.dumps(asdict(description), indent=1)


def read_adapter_json(path: Path) -> AdapterDescription:
    """Of a checkpoint.

    Raises:
        CheckpointError: the file is not what this project writes.
    """
    try:
        values = json.loads(path.read_bytes())
        description = AdapterDescription(**{**values, "projections": tuple(values["projections"])})
        usable = description.rank >= 1 and description.alpha > 0 and set(description.projections) <= set(PROJECTIONS)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not readable ({error}); restore the file") from None
    if not usable:
        raise CheckpointError(f"{path} describes no adapters that this version knows; restore the file")
    return description


class AdapterTensors:
    """The adapters of a checkpoint by layer, projection and, in a mixture, expert.

    Adapters on the experts of a layer are stored in one tensor for each projection and side, stacked on the first axis.

    Raises:
        CheckpointError: with every tensor that is missing, unexpected or of the wrong rank.
    """

    def __init__(
        self, checkpoint: DistributedCheckpoint, description: AdapterDescription, architecture: Architecture
    ) -> None:
        self.checkpoint, self.description = checkpoint, description
        self.origin, self.scale = checkpoint.origin, description.scale
        self._of_layer: tuple[int, dict[str, Tensor]] = (0, {})
        """A layer, and what was read of its stacked tensors: experts are asked for in turn."""
        self._stacked = frozenset(PROJECTIONS if architecture.experts is not None else ()) - set(ATTENTION)
        self._places = {
            f"{hf_module(layer, name, architecture.family.experts, expert)}.weight": (layer, name, expert)
            for layer in range(architecture.num_layers)
            for name in description.projections
            for expert in range(architecture.experts.number if architecture.experts and name in self._stacked else 1)
        }
        expected = {
            f"{PREFIX}layers.{layer}.{name}.{side}"
            for layer, name, _ in self._places.values()
            for side in ("lora_A", "lora_B")
        }
        stored = {name for name in checkpoint.tensors if name.startswith(PREFIX)}
        if stored != expected:
            missing, unknown = sorted(expected - stored), sorted(stored - expected)
            raise CheckpointError(
                f"{checkpoint.origin} holds other adapters than {run_files.ADAPTER} says: {len(missing)} are missing "
                f"and {len(unknown)} unknown, first {[*missing, *unknown][0]}"
            )
        self._check_experts(architecture)

    def _check_experts(self, architecture: Architecture) -> None:
        number = architecture.experts.number if architecture.experts is not None else 0
        for layer, name, _ in self._places.values():
            if name not in self._stacked:
                continue
            for key in (f"{PREFIX}layers.{layer}.{name}.{side}" for side in ("lora_A", "lora_B")):
                size = list(self.checkpoint.tensors[key].size)
                if len(size) != 3 or size[0] != number:
                    raise CheckpointError(
                        f"{self.origin}: {key} is {size}, and the model has {number} experts; restore the file"
                    )

    def changed(self) -> list[str]:
        """Hugging Face names of the weights that adapters are added to."""
        return list(self._places)

    def pair_of(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a weight by its Hugging Face name, as :meth:`pair`."""
        return self.pair(*self._places[name])

    def pair(self, layer: int, projection: str, expert: int = 0) -> tuple[Tensor, Tensor]:
        """A ``[rank, in]`` and B ``[out, rank]`` as stored; ``expert`` counts if the projection is an expert's."""
        first = f"{PREFIX}layers.{layer}.{projection}"
        down, up = (self._read(layer, f"{first}.{side}") for side in ("lora_A", "lora_B"))
        if projection in self._stacked:
            down, up = down[expert], up[expert]
        rank = self.description.rank
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise CheckpointError(
                f"{self.checkpoint.origin}: {first} is {list(down.shape)} and {list(up.shape)}, and "
                f"{run_files.ADAPTER} says that its rank is {rank}; restore the file"
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise CheckpointError(
                f"{self.checkpoint.origin}: {first} holds NaN or infinity, so nothing is written; give a checkpoint "
                f"whose adapters are finite"
            )
        return down, up

    def _read(self, layer: int, key: str) -> Tensor:
        if not self._stacked:
            return self.checkpoint.read(key)
        if self._of_layer[0] != layer:
            self._of_layer = (layer, {})
        if key not in self._of_layer[1]:
            self._of_layer[1][key] = self.checkpoint.read(key)
        return self._of_layer[1][key]


class Adapters(Protocol):
    """Low-rank changes of a model's weights."""

    origin: str
    scale: float
    """What the product of B and A is multiplied by."""

    def changed(self) -> Iterable[str]:
        """Hugging Face names of the weights that adapters are added to."""

    def pair_of(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[rank, in]`` and B ``[out, rank]`` of a weight."""


class MergedSource(TensorSource):
    """A base model with its adapters added to the weights.

    Raises:
        CheckpointError: adapters of weights that the base does not have.
    """

    def __init__(self, base: TensorSource, adapters: Adapters) -> None:
        super().__init__(adapters.origin, {name: base.shape(name) for name in base.names()})
        self._base, self._adapters = base, adapters
        self._changed = frozenset(adapters.changed())
        if unknown := sorted(self._changed - set(base.names())):
            raise CheckpointError(
                f"{self.origin} holds an adapter of {unknown[0]}, which the base does not have; give the base that the "
                "adapters were trained on"
            )

    def dtype(self, name: str) -> torch.dtype:
        """That of the base's tensor."""
        return self._base.dtype(name)

    def get(self, name: str) -> Tensor:
        """The base's tensor and, where there is one, its adapter's product; added in float32."""
        tensor = self._base.get(name)
        if name not in self._changed:
            return tensor
        down, up = self._adapters.pair_of(name)
        change = up.float() @ down.float() * self._adapters.scale
        if change.shape != tensor.shape:
            raise CheckpointError(
                f"{self.origin}: the adapters of {name} are for {list(change.shape)}, and the base has "
                f"{list(tensor.shape)}; give the base that they were trained on"
            )
        return (tensor.float() + change).to(tensor.dtype)


def named_base(description: AdapterDescription, origin: str) -> tuple[str, str | None]:
    """What others load the base by: its name and revision on the hub if it came from there, else its path.

    Raises:
        CheckpointError: it is random weights, which nobody else has.
    """
    if description.base is None:
        raise CheckpointError(
            f"{origin} holds adapters of random weights, which no other program has; export the merged model, without "
            "--adapter"
        )
    return hub_name_of(Path(description.base)) or (description.base, None)


def write_peft(
    directory: Path, adapters: AdapterTensors, architecture: Architecture, files: Mapping[str, bytes]
) -> None:
    """An adapter directory as `peft` and vLLM load it, with the ``files`` of tokenizer and chat template.

    A mixture's experts are modules of their own there, as in transformers 4.57; with transformers 5, `peft` stacks
    their adapters when it loads them.

    Raises:
        CheckpointError: the base is random weights, which nobody else has.
        OSError: it cannot be written.
    """
    from safetensors.torch import save_file

    description = adapters.description
    base, revision = named_base(description, adapters.origin)
    tensors: dict[str, Tensor] = {}
    for name in adapters.changed():
        first = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = adapters.pair_of(name)
        tensors[f"{first}.lora_A.weight"] = down.contiguous()
        tensors[f"{first}.lora_B.weight"] = up.contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": description.rank,
        "lora_alpha": description.alpha,
        "lora_dropout": description.dropout,
        "target_modules": [hf_projection(name, architecture.family.experts) for name in description.projections],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    save_file(tensors, directory / PEFT_WEIGHTS, metadata={"format": "pt"})
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")

"""LoRA adapters in PEFT's form, as `peft`, TRL and others save them beside no weights of their own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_lmpo.errors import CheckpointError, shown
from nemo_lmpo.formats.peft_files import PEFT_CONFIG, PEFT_WEIGHTS

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_NEUTRAL: tuple[object, ...] = (None, False, 0, "none", [], {})
_READ_OR_SHOWN_BY_TENSORS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_core"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules"),
        *("task_type", "use_rslora"),
    )
)
"""Fields of `adapter_config.json` that are read here, that the stored tensors show, or that only training uses."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; others (PiSSA, OLoRA, LoftQ) change it."""
_MERGE = "merge the adapter with peft's merge_and_unload first"


class PeftAdapter:
    """The adapters of a PEFT directory: plain LoRA on linear layers.

    Raises:
        CheckpointError: a file is missing or damaged, or a setting asks for more than plain LoRA; names it.
    """

    def __init__(self, directory: Path) -> None:
        self.origin = str(directory)
        settings = self._settings(directory / PEFT_CONFIG)
        self.base = settings.get("base_model_name_or_path")
        rank, alpha = settings.get("r"), settings.get("lora_alpha")
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0):
            raise CheckpointError(
                f"{directory / PEFT_CONFIG}: r={shown(rank)} and lora_alpha={shown(alpha)} are invalid"
            )
        self.scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        self._tensors = self._load(directory / PEFT_WEIGHTS)

    @staticmethod
    def _settings(path: Path) -> dict[str, Any]:
        try:
            settings = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not readable ({error}); restore the file") from None
        if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
            raise CheckpointError(f"{path} does not describe LoRA adapters; {_MERGE}")
        for name, value in settings.items():
            if name == "init_lora_weights" and value in _STARTS:
                continue
            if name not in _READ_OR_SHOWN_BY_TENSORS and value not in _NEUTRAL:
                raise CheckpointError(f"{path}: {name}={shown(value)} is not supported; {_MERGE}")
        return settings

    def _load(self, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise CheckpointError(f"{path} is missing; save the adapter as safetensors")
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); restore the file") from None
        sides: dict[str, dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            found = _TENSOR.fullmatch(name)
            if found is None or tensor.dim() != 2:
                raise CheckpointError(f"{path} holds {shown(name)}, which is not a plain LoRA tensor; {_MERGE}")
            sides.setdefault(f"{found['module']}.weight", {})[found["side"]] = tensor
        for name, pair in sides.items():
            if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                raise CheckpointError(
                    f"{path}: the adapter of {name} is incomplete, or its ranks differ; restore the file"
                )
        return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}

    def changed(self) -> list[str]:
        """Hugging Face names of the weights that adapters are added to."""
        return list(self._tensors)

    def pair_of(self, name: str) -> tuple[Tensor, Tensor]:
        """A ``[rank, in]`` and B ``[out, rank]`` of a weight."""
        return self._tensors[name]

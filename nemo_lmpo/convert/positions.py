"""Compare how two descriptions of a model treat positions: its windows, and its rotary embedding.

A window of 32768 shows in no prompt that is quickly computed. So transformers builds a small twin from the model's own
config: the same layers, heads of the same size, the same rotary embedding and context, but few channels, random weights
and, in place of each window, a small one. megatron-core computes the same twin from the converted model's description.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_lmpo.convert.megatron import megatron_model, model_logits
from nemo_lmpo.errors import CheckpointError, first_line
from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.families import ExpertNames
from nemo_lmpo.formats.fused_experts import separate_experts
from nemo_lmpo.formats.source import TensorSource

_LENGTH = 48
_SMALLEST_WINDOW = 8
_SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
_VOCABULARY = 64


class _StateSource(TensorSource):
    """The tensors of a model in memory."""

    def __init__(self, state: dict[str, Tensor], experts: ExpertNames | None) -> None:
        if experts is not None:
            state = {
                name: tensor[selection]
                for stored, tensor in state.items()
                for name, selection, _ in separate_experts(stored, tuple(tensor.shape), experts)
            }
        super().__init__("twin", {name: tuple(tensor.shape) for name, tensor in state.items()})
        self._state = state

    def dtype(self, name: str) -> torch.dtype:
        return self._state[name].dtype

    def get(self, name: str) -> Tensor:
        return self._state[name]


def positions_difference(directory: Path, architecture: Architecture) -> float:
    """The largest difference of the logits of the two twins, beyond every window and at both ends of the context.

    Args:
        directory: a Hugging Face model, whose config transformers reads.
        architecture: the description of the converted model.

    Raises:
        CheckpointError: transformers cannot read the config, or makes another kind of model of it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot read {directory} ({first_line(error)}); check config.json"
        ) from None
    given = (getattr(config, "sliding_window", None), architecture.sliding_window)
    windows = sorted({int(window) for window in given if window is not None})
    small = {window: _SMALLEST_WINDOW * (1 + rank) for rank, window in enumerate(windows)}
    experts = architecture.family.experts
    theirs = _their_twin(config, architecture.head_dim, small, None if experts is None else experts.width)
    twin = replace(
        architecture,
        vocab_size=_VOCABULARY,
        hidden_size=_SIZES["hidden_size"],
        ffn_hidden_size=_SIZES["intermediate_size"],
        num_attention_heads=_SIZES["num_attention_heads"],
        num_query_groups=_SIZES["num_key_value_heads"],
        sliding_window=small.get(architecture.sliding_window or 0),
        tie_word_embeddings=False,
        experts=architecture.experts and replace(architecture.experts, ffn_hidden_size=_SIZES["intermediate_size"]),
    )
    ids = [(7919 * position + 13) % _VOCABULARY for position in range(_LENGTH)]
    offsets = (0, max(0, architecture.max_position_embeddings - _LENGTH // 2))
    expected = [_their_logits(theirs, ids, offset) for offset in offsets]
    with megatron_model(twin, _StateSource(theirs.state_dict(), experts)) as model:
        found = [model_logits(model, ids, offset) for offset in offsets]
    # torch's maximum keeps a NaN, Python's may not.
    return float((torch.stack(expected) - torch.stack(found)).abs().max())


def _their_twin(config: Any, head_dim: int, small: dict[int, int], expert_width: str | None) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    more: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "head_dim": head_dim,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    if expert_width is not None:
        more[expert_width] = _SIZES["intermediate_size"]
    more.update(dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")))
    if getattr(config, "sliding_window", None) is not None:
        more["sliding_window"] = small[config.sliding_window]
    for name, value in {**_SIZES, **more}.items():
        setattr(config, name, value)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
    return model.eval()


@torch.no_grad()
def _their_logits(model: torch.nn.Module, ids: list[int], offset: int) -> Tensor:
    positions = torch.arange(offset, offset + len(ids))[None]
    logits: Tensor = model(torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0]
    return logits

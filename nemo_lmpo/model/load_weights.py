"""Fill megatron-core models from a source of Hugging Face tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.lora_targets import ADAPTERS
from nemo_lmpo.formats.mapping import (
    EMBEDDING,
    EXPERTS,
    HF_EMBEDDING,
    LAYERS,
    LOCAL_SPEC_NAMES,
    OUTPUT_LAYER,
    Place,
    Rule,
    TensorLayout,
    fill,
    megatron_shape,
    rules,
)
from nemo_lmpo.formats.source import TensorSource, check_source, raise_if_any
from nemo_lmpo.parallel.shards import gathered_dtype, is_shared, take_part

_LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_PARAMETERS = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>\w+)\.weight"),
    re.compile(r"mlp\.experts\.(?P<linear>\w+)\.weight(?P<expert>\d+)"),
)
"""Of experts one after the other, and of Transformer Engine's grouped ones."""


def load_model_weights(
    model_chunks: list[torch.nn.Module],
    source: TensorSource,
    architecture: Architecture,
    *,
    tp_rank: int,
    tp_size: int,
    experts: ExpertPart | None = None,
) -> None:
    """Fill this rank's parameters in place, reading only the parts of the tensors that it holds.

    ``model_chunks`` are megatron-core ``GPTModel``s (several with a virtual pipeline), bare or inside wrappers
    that keep the model as ``module``. Layers are identified by their ``layer_number``, so any pipeline layout
    works. Values are cast to the parameters' dtype; vocabulary rows beyond the source's become zero. A tied
    model's ``output_layer``, which a last pipeline stage keeps as a copy, is filled from the embedding.
    ``experts`` says which part of a mixture's experts lies here; unset: whole ones, the first of them first.

    Names and shapes of the whole source are checked first, on every rank alike. No collectives.

    Raises:
        CheckpointError: with every tensor that is missing, unexpected or of the wrong shape.
        ConfigError: ``tp_size`` does not divide a dimension of the model.
    """
    from megatron.core.utils import unwrap_model

    check_source(source, architecture)
    held = experts or ExpertPart()
    targets = [target for chunk in unwrap_model(model_chunks) for target in _targets(chunk, architecture, held.first)]
    _check_targets(targets, architecture, tp_size, held.tp_size)
    for _, parameter, rule, place in targets:
        assert rule is not None
        parts = [source.get(name) for name in rule.hf_names(place)]
        whole = parameter
        if is_shared(parameter):
            # Filled whole in the dtype that it is gathered in, so that it starts as in any other layout.
            whole = torch.empty(parameter.shape, dtype=gathered_dtype(parameter), device=parameter.device)
        rank, size = (held.tp_rank, held.tp_size) if rule.per_expert else (tp_rank, tp_size)
        fill(whole, rule, parts, architecture, tp_rank=rank, tp_size=size)
        if whole is not parameter:
            take_part(parameter, whole)


@dataclass(frozen=True)
class ExpertPart:
    """Which part of a layer's experts a rank holds."""

    first: int = 0
    """The first of its experts, counted over all ranks."""
    tp_rank: int = 0
    """Which part of each of them, of ``tp_size``."""
    tp_size: int = 1


_Target = tuple[str, Tensor, Rule | None, Place]
"""Parameter name, parameter, its rule (None: unknown), global layer and expert."""


def _targets(model: torch.nn.Module, architecture: Architecture, first_expert: int = 0) -> Iterator[_Target]:
    by_name = {rule.megatron: rule for rule in rules(architecture)}
    # Tied models keep a copy of the embedding on a last stage that has none of its own.
    by_name.setdefault(OUTPUT_LAYER, Rule(OUTPUT_LAYER, (HF_EMBEDDING,), TensorLayout.VOCABULARY))
    for name, parameter in model.named_parameters():
        if name.startswith(f"{ADAPTERS}."):
            continue  # they have starts of their own
        match = _LAYER_PARAMETER.fullmatch(name)
        if match is None:
            yield name, parameter, by_name.get(name), Place()
            continue
        local, rest = int(match[1]), match[2]
        number = model.get_submodule(f"{LAYERS}{local}").layer_number
        assert isinstance(number, int)
        stored, expert = _stored_name(rest)
        if LAYERS + stored not in by_name:
            stored = LOCAL_SPEC_NAMES.get(rest, rest)
        yield name, parameter, by_name.get(LAYERS + stored), Place(number - 1, first_expert + expert)


def _stored_name(name: str) -> tuple[str, int]:
    """What a layer's parameter is called in a checkpoint, and the number of its expert among those that lie here."""
    for form in _EXPERT_PARAMETERS:
        if (match := form.fullmatch(name)) is not None:
            return f"{EXPERTS}{match['linear']}.weight", int(match["expert"])
    return name, 0


def _check_targets(targets: list[_Target], architecture: Architecture, tp_size: int, expert_tp_size: int) -> None:
    wrong_shapes = []
    for name, parameter, rule, _ in targets:
        if rule is None:
            continue
        size = expert_tp_size if rule.per_expert else tp_size
        padded = parameter.shape[0] * tp_size if rule.layout is TensorLayout.VOCABULARY else None
        expected = megatron_shape(rule, architecture, tp_size=size, padded_vocab_size=padded)
        if tuple(parameter.shape) != expected:
            wrong_shapes.append(f"{name} is {list(parameter.shape)} instead of {list(expected)}")
        elif padded is not None and padded < architecture.vocab_size:
            wrong_shapes.append(f"{name} has {padded} rows in all, fewer than the vocabulary {architecture.vocab_size}")
    raise_if_any(
        "the built model",
        missing=() if targets else (EMBEDDING,),
        unexpected=[name for name, _, rule, _ in targets if rule is None],
        wrong_shapes=wrong_shapes,
        remedy="build it from the same architecture as the weights",
    )

"""Check a conversion: every tensor, and the logits of `transformers` against those of the megatron-core model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_lmpo.convert.megatron import megatron_model, model_logits
from nemo_lmpo.convert.positions import positions_difference
from nemo_lmpo.convert.tokens import PROMPTS, compare_tokenizers, model_tokenizer
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.conversion import tensor_names
from nemo_lmpo.formats.model_files import ModelFiles

_ID_LENGTHS = (1, 17, 96)
"""Lengths of prompts made of token ids directly; they also serve models without a tokenizer."""
_BLOCK_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class Verification:
    """The outcome, in words and as a verdict."""

    passed: bool
    lines: list[str]


def verify_models(
    reference: ModelFiles,
    converted: ModelFiles,
    *,
    tolerance: float,
    tensors_only: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Verification:
    """Compare all tensors, the tokenizers and, computed in float32, the logits.

    Logits are those of short prompts, and of a small twin at positions beyond every window. The largest absolute
    difference of each must not exceed ``tolerance``. If the two are stored in different dtypes, the weights of both are
    rounded to the narrower one first. Models run one after the other, so memory holds one of them in float32.

    Raises:
        CheckpointError: the two are different models, or the files of a tokenizer are damaged.
    """
    narrow = _narrower(reference, converted)
    tensors = compare_tensors(reference, converted, dtype=narrow, progress=progress)
    lines = [
        f"tensors: {tensors.num_tensors} compared, {tensors.num_different} differ, "
        f"largest difference {tensors.largest:.3g}" + (f" ({tensors.name})" if tensors.num_different else "")
    ]
    if narrow is not None:
        lines.insert(0, f"dtypes differ: the weights of both models are rounded to {narrow}".replace("torch.", ""))
    passed = tensors.largest <= tolerance
    if not tensors_only:
        prompts = prompt_ids(reference)
        expected = transformers_logits(Path(reference.origin), prompts, rounded_to=narrow)
        with megatron_model(converted.architecture, converted.source) as model:
            _round(model, narrow)
            differences = [
                float((model_logits(model, ids) - logits).abs().max())
                for ids, logits in zip(prompts, expected, strict=True)
            ]
        tokens = sum(len(ids) for ids in prompts)
        lines.append(f"logits: {len(prompts)} prompts, {tokens} tokens, largest difference {max(differences):.3g}")
        beyond = positions_difference(Path(reference.origin), converted.architecture)
        lines.append(f"positions beyond every window, and at the end of the context: largest difference {beyond:.3g}")
        # A NaN compares as false, so it fails.
        passed = passed and all(difference <= tolerance for difference in (*differences, beyond))
        same, line = compare_tokenizers(reference, converted)
        lines.append(line)
        passed = passed and same
    lines.append(f"{'passed' if passed else 'FAILED'}: tolerance {tolerance:g}")
    return Verification(passed, lines)


@dataclass(frozen=True)
class Difference:
    """The largest absolute difference of all tensors, and where it is."""

    largest: float
    name: str
    num_different: int
    """Tensors with any difference."""
    num_tensors: int


def compare_tensors(
    reference: ModelFiles,
    converted: ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Difference:
    """Compare all tensors; with ``dtype``, both sides are rounded to it first.

    A NaN on one side only, or at different places, counts as an infinite difference.

    Raises:
        CheckpointError: the models do not have the same tensors.
    """
    _refuse_different_models(reference, converted)
    names = tensor_names(reference)
    largest, worst, different = 0.0, "", 0
    for name in names:
        found = _largest_difference(reference.source.get(name), converted.source.get(name), dtype)
        different += found > 0
        if found > largest or not worst:
            largest, worst = found, name
        progress(name)
    return Difference(largest, worst, different, len(names))


_WITHOUT_EFFECT = {"model_type", "max_position_embeddings", "initializer_range", "tie_word_embeddings"}
"""Fields that do not change what a model computes; NeMo does not keep all of them."""


def _refuse_different_models(reference: ModelFiles, converted: ModelFiles) -> None:
    left, right = asdict(reference.architecture), asdict(converted.architecture)
    differing = [
        f"{name} {left[name]!r} and {right[name]!r}"
        for name in left
        if name not in _WITHOUT_EFFECT and left[name] != right[name]
    ]
    if differing:
        raise CheckpointError(f"{reference.origin} and {converted.origin} are different models: {'; '.join(differing)}")
    lacking = sorted(set(tensor_names(reference)) - set(tensor_names(converted)))
    if lacking:
        raise CheckpointError(f"{converted.origin} lacks tensors of {reference.origin}: {', '.join(lacking)}")


def _largest_difference(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype | None) -> float:
    left, right = left.reshape(-1), right.reshape(-1)
    largest = 0.0
    for start in range(0, left.numel(), _BLOCK_ELEMENTS):
        a, b = left[start : start + _BLOCK_ELEMENTS], right[start : start + _BLOCK_ELEMENTS]
        if dtype is not None:
            a, b = a.to(dtype), b.to(dtype)
        a, b = a.double(), b.double()
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        # Equal infinities differ by NaN, which nan_to_num makes 0.
        difference = (a - b).abs().masked_fill(a == b, 0.0).nan_to_num(nan=0.0, posinf=float("inf"))
        largest = max(largest, float(difference.max()))
    return largest


def _narrower(reference: ModelFiles, converted: ModelFiles) -> torch.dtype | None:
    """The dtype that one of the two was rounded to; None if they are stored alike."""
    name = tensor_names(reference)[0]
    left, right = reference.source.dtype(name), converted.source.dtype(name)
    if left == right:
        return None
    return right if right.itemsize <= left.itemsize else left


@torch.no_grad()
def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def prompt_ids(model: ModelFiles) -> list[list[int]]:
    """Token ids of the fixed prompts: texts where the model has a tokenizer, and ids by a formula.

    Raises:
        CheckpointError: the tokenizer's files are damaged.
    """
    vocabulary, positions = model.architecture.vocab_size, model.architecture.max_position_embeddings
    prompts = [[(7919 * position + 13) % vocabulary for position in range(length)] for length in _ID_LENGTHS]
    tokenizer = model_tokenizer(model)
    if tokenizer is not None:
        prompts += [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    kept = [ids[:positions] for ids in prompts]
    return [ids for ids in kept if ids and max(ids) < vocabulary]


@torch.no_grad()
def transformers_logits(
    directory: Path, prompts: list[list[int]], *, rounded_to: torch.dtype | None = None
) -> list[Tensor]:
    """Logits ``[tokens, vocabulary]`` of each prompt, by `transformers` in float32.

    With ``rounded_to``, the weights are rounded to that dtype first.

    Raises:
        CheckpointError: `transformers` cannot load the directory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {directory} ({error}); check its config.json") from None
    _round(model.eval(), rounded_to)
    return [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]

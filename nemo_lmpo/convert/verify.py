"""Check a conversion: every tensor, and the logits of `transformers` against those of the megatron-core model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats.conversion import tensor_names
from nemo_lmpo.formats.model_files import ModelFiles

if TYPE_CHECKING:
    from nemo_lmpo.model.packed_gpt import PackedGPTModel

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Q: If I have 3 apples and buy 4 more, how many apples do I have?\nA:",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
)
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
    """Compare all tensors and, computed in float32, the logits.

    The largest absolute difference of each must not exceed ``tolerance``. If the two are stored in different
    dtypes, the weights of both are rounded to the narrower one first. Models run one after the other, so memory
    holds one of them in float32.

    Raises:
        CheckpointError: the two are different models.
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
        with megatron_model(converted) as model:
            _round(model, narrow)
            differences = [
                float((model_logits(model, ids) - logits).abs().max())
                for ids, logits in zip(prompts, expected, strict=True)
            ]
        tokens = sum(len(ids) for ids in prompts)
        lines.append(f"logits: {len(prompts)} prompts, {tokens} tokens, largest difference {max(differences):.3g}")
        # A NaN compares as false, so it fails.
        passed = passed and all(difference <= tolerance for difference in differences)
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
    name = reference.source.names()[0]
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
    """Token ids of the fixed prompts: texts where the model has a tokenizer, and ids by a formula."""
    vocabulary, positions = model.architecture.vocab_size, model.architecture.max_position_embeddings
    prompts = [[(7919 * position + 13) % vocabulary for position in range(length)] for length in _ID_LENGTHS]
    if any(name.startswith("tokenizer") for name in model.sidecars):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model.origin, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
            raise CheckpointError(
                f"{model.origin}: its tokenizer cannot be read ({error}); restore its files"
            ) from None
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


@contextmanager
def megatron_model(files: ModelFiles) -> Iterator[PackedGPTModel]:
    """The model on the CPU in float32, in a process group of this process alone; both go with the context."""
    import torch.distributed as dist

    from nemo_lmpo.config.schema import ModelConfig
    from nemo_lmpo.model.load_weights import load_model_weights
    from nemo_lmpo.parallel.groups import create_groups, destroy_groups, start_process_group
    from nemo_lmpo.runtime.cpu_adapter import on_cpu
    from nemo_lmpo.runtime.launch import LaunchInfo

    if dist.is_initialized():
        raise RuntimeError("a verification needs a process without a process group")
    config = ModelConfig(make_vocab_size_divisible_by=1, transformer_engine=False, attention_backend="sdpa")
    with on_cpu(), warnings.catch_warnings():
        # megatron-core remarks on every GPU package that is not installed.
        warnings.simplefilter("ignore")
        start_process_group(LaunchInfo(), use_cuda=False)
        try:
            from nemo_lmpo.model.build import build_model_chunks
            from nemo_lmpo.model.kernels import Kernels

            chunks = build_model_chunks(
                files.architecture,
                config,
                groups=create_groups(config),
                dtype=torch.float32,
                device=torch.device("cpu"),
                kernels=Kernels(transformer_engine=False, attention="sdpa"),
            )
            modules: list[Any] = list(chunks)
            load_model_weights(modules, files.source, files.architecture, tp_rank=0, tp_size=1)
            yield chunks[0].eval()
        finally:
            destroy_groups()


@torch.no_grad()
def model_logits(model: PackedGPTModel, ids: list[int]) -> Tensor:
    """Logits ``[tokens, vocabulary]`` float32 of one sequence, inside :func:`megatron_model`."""
    from nemo_lmpo.model.attention_plan import plan_attention
    from nemo_lmpo.parallel.context import attention_spans

    length = len(ids)
    segments = torch.tensor([[0, length, 0, 0]], dtype=torch.int32)
    spans = attention_spans(segments, length, cp_rank=0, cp_size=1)
    hidden = model(torch.tensor([ids]), torch.arange(length)[None], plan_attention(spans, length, cp_size=1))
    return hidden[:, 0].float() @ model.output_weight().float().T

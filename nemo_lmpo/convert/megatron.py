"""A model's logits as megatron-core computes them, on the CPU in float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_lmpo.formats.architecture import Architecture
from nemo_lmpo.formats.source import TensorSource

if TYPE_CHECKING:
    from nemo_lmpo.model.packed_gpt import PackedGPTModel


@contextmanager
def megatron_model(architecture: Architecture, source: TensorSource) -> Iterator[PackedGPTModel]:
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
                architecture,
                config,
                groups=create_groups(config),
                dtype=torch.float32,
                device=torch.device("cpu"),
                kernels=Kernels(transformer_engine=False, attention="sdpa"),
            )
            modules: list[Any] = list(chunks)
            load_model_weights(modules, source, architecture, tp_rank=0, tp_size=1)
            yield chunks[0].eval()
        finally:
            destroy_groups()


@torch.no_grad()
def model_logits(model: PackedGPTModel, ids: list[int], first_position: int = 0) -> Tensor:
    """Logits ``[tokens, vocabulary]`` float32 of one sequence, inside :func:`megatron_model`."""
    from nemo_lmpo.model.attention_plan import plan_attention
    from nemo_lmpo.parallel.context import attention_spans

    length = len(ids)
    segments = torch.tensor([[0, length, 0, 0]], dtype=torch.int32)
    spans = attention_spans(segments, length, cp_rank=0, cp_size=1)
    positions = torch.arange(first_position, first_position + length)[None]
    hidden = model(torch.tensor([ids]), positions, plan_attention(spans, length, cp_size=1))
    logits: Tensor = hidden[:, 0].float() @ model.output_weight().float().T
    return logits

"""Every attention kernel of the machine against float64 by definition, and the head and the optimizer."""

from __future__ import annotations

import pytest
import torch

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.doctor.parity import HEAD_DIM, TOLERANCE, attention_values, distance, logprob_values, optimizer_values
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.model.kernels import choose_kernels, this_device
from tests.gpu.runs import NEEDS_TE


@pytest.mark.parametrize("backend", ["flash", pytest.param("te", marks=NEEDS_TE), "sdpa"])
@pytest.mark.parametrize("window", [None, 16])
def test_attention(backend: str, window: int | None) -> None:
    model = ModelConfig(attention_backend=backend)  # type: ignore[arg-type]
    try:
        kernels = choose_kernels(model, precision="bf16", head_dim=HEAD_DIM, device=this_device(use_cuda=True))
    except ConfigError as error:
        pytest.skip(str(error))
    pairs = attention_values(kernels, torch.device("cuda"), torch.bfloat16, window=window)
    assert max(distance(*pair) for pair in pairs) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logprobs(dtype: torch.dtype) -> None:
    assert max(distance(*pair) for pair in logprob_values(torch.device("cuda"), dtype)) < TOLERANCE[dtype]


def test_optimizer() -> None:
    assert max(distance(*pair) for pair in optimizer_values(torch.device("cuda"))) < TOLERANCE[torch.float32]

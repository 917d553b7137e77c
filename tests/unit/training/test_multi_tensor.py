"""Norm and scale of all gradients at once against megatron-core's own fallbacks."""

from __future__ import annotations

import pytest
import torch

from nemo_lmpo.runtime.cpu_adapter import on_cpu
from nemo_lmpo.training import multi_tensor
from tests.stalls import no_stalls

FLAG = torch.zeros(1, dtype=torch.int)


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5), (7,), (2, 2, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    from megatron.core.utils import local_multi_tensor_l2_norm

    tensors = gradients(dtype)
    with no_stalls():
        found, _ = multi_tensor.l2_norm(0, FLAG, [tensors], False)
    with on_cpu():
        theirs, _ = local_multi_tensor_l2_norm(0, FLAG, [[tensor.float() for tensor in tensors]], False)
    assert found.shape == theirs.shape == (1,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs)
    exact = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=0)


def test_scale_in_place_and_into_others() -> None:
    tensors = gradients(torch.float32)
    expected = [tensor * 0.25 for tensor in tensors]
    targets = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
    multi_tensor.scale(0, FLAG, [tensors, targets], 0.25)
    assert all(torch.equal(target, right.bfloat16()) for target, right in zip(targets, expected, strict=True))
    multi_tensor.scale(0, FLAG, [tensors, targets], 1.0)
    assert all(torch.equal(target, tensor.bfloat16()) for target, tensor in zip(targets, tensors, strict=True))
    multi_tensor.scale(0, FLAG, [tensors, tensors], 0.25)
    assert all(torch.equal(tensor, right) for tensor, right in zip(tensors, expected, strict=True))


def test_take_the_places_of_the_fallbacks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale)
    fused = object()
    monkeypatch.setattr(optimizer, "multi_tensor_scale_impl", fused)
    multi_tensor.replace_fallbacks()
    assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
    assert clip_grads.multi_tensor_scale_impl is multi_tensor.scale
    assert optimizer.multi_tensor_scale_impl is fused

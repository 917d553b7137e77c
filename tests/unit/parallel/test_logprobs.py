"""Log-probabilities against torch.log_softmax in float64, values and both gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemo_lmpo.parallel.logprobs import VocabularyPart, vocab_parallel_logprobs

HIDDEN, VOCABULARY, POSITIONS = 16, 37, 23


def make(rows: int = VOCABULARY, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight = torch.randn(rows, HIDDEN, generator=generator) * scale
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    upstream = torch.randn(POSITIONS, generator=generator)
    return hidden, weight, targets, upstream


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients in float64 over the real vocabulary."""
    hidden = hidden.double().requires_grad_()
    weight = weight[:VOCABULARY].double().requires_grad_()
    value = torch.log_softmax(hidden @ weight.T, dim=-1)[torch.arange(POSITIONS), targets]
    (value * upstream.double()).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [1, 7, POSITIONS, 1000])
@pytest.mark.parametrize("padding", [0, 3, 27])
def test_equals_log_softmax(chunk_tokens: int, padding: int) -> None:
    hidden, weight, targets, upstream = make(VOCABULARY + padding)
    value, grad_hidden, grad_weight = exact(hidden, weight, targets, upstream)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    found = vocab_parallel_logprobs(
        hidden, weight, targets, part=VocabularyPart(0, VOCABULARY), group=None, chunk_tokens=chunk_tokens
    )
    (found * upstream).sum().backward()
    assert found.dtype == torch.float32
    # float32: sums of 16 products and of 37 exponentials
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad[:VOCABULARY].double(), grad_weight, rtol=1e-5, atol=1e-5)
    assert not weight.grad[VOCABULARY:].any(), "padding rows must not learn"


def test_padding_rows_have_no_probability_whatever_they_hold() -> None:
    hidden, weight, targets, upstream = make(VOCABULARY + 3)
    value, _, _ = exact(hidden, weight, targets, upstream)
    weight[VOCABULARY:] = 1e4
    found = vocab_parallel_logprobs(hidden, weight, targets, part=VocabularyPart(0, VOCABULARY), group=None)
    torch.testing.assert_close(found.double(), value, rtol=1e-6, atol=2e-6)


def test_one_gradient_may_be_wanted_alone() -> None:
    hidden, weight, targets, upstream = make()
    _, grad_hidden, grad_weight = exact(hidden, weight, targets, upstream)
    part = VocabularyPart(0, VOCABULARY)
    hidden.requires_grad_()
    (vocab_parallel_logprobs(hidden, weight, targets, part=part, group=None) * upstream).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-5, atol=1e-5)
    hidden, weight = hidden.detach(), weight.requires_grad_()
    (vocab_parallel_logprobs(hidden, weight, targets, part=part, group=None) * upstream).sum().backward()
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_ten_thousand_apart_stay_finite(dtype: torch.dtype) -> None:
    """Logits 0, 1e4, -1e4: the best token has probability 1, the worst's logarithm is the distance to it."""
    hidden = torch.ones(3, 1, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[0.0], [1e4], [-1e4]], dtype=dtype).requires_grad_()
    targets = torch.tensor([0, 1, 2])
    found = vocab_parallel_logprobs(hidden, weight, targets, part=VocabularyPart(0, 3), group=None)
    best, worst = float(weight[1]), float(weight[2])
    assert found.tolist() == [-best, 0.0, worst - best]
    found.sum().backward()
    # d/dlogits: one at the target, minus one at the certain token
    expected = torch.tensor([[1.0], [-2.0], [1.0]], dtype=dtype)
    torch.testing.assert_close(weight.grad, expected)
    assert torch.isfinite(hidden.grad).all()
    # position 0: w0 - w1; position 1: nothing; position 2: w2 - w1
    torch.testing.assert_close(hidden.grad.float(), torch.tensor([[-best], [0.0], [worst - best]]), rtol=0.01, atol=0)


def test_bfloat16_is_as_good_as_its_logits() -> None:
    """A bfloat16 logit has a relative error of at most 2^-8; all that follows is float32."""
    hidden, weight, targets, upstream = make(scale=2.0)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    value, _, grad_weight = exact(hidden, weight, targets, upstream)
    weight.requires_grad_()
    found = vocab_parallel_logprobs(
        hidden, weight, targets, part=VocabularyPart(0, VOCABULARY), group=None, chunk_tokens=5
    )
    assert found.dtype == torch.float32
    largest = (hidden.double() @ weight.detach().double().T).abs().max()
    assert (found.double() - value).abs().max() < 2 * largest * 2.0**-8
    (found * upstream).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad.double() - grad_weight).norm() < 0.05 * grad_weight.norm()


def test_no_positions_give_no_logprobs_and_no_gradient() -> None:
    """A context-parallel rank can hold no predicting position."""
    _, weight, _, _ = make()
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight.requires_grad_()
    found = vocab_parallel_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), part=VocabularyPart(0, VOCABULARY), group=None
    )
    assert found.shape == (0,)
    found.sum().backward()
    assert not weight.grad.any()

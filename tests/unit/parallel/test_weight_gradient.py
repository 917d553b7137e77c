"""The head's gradient of the output matrix goes straight into the float32 gradient that megatron-core keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_lmpo.parallel import logprobs
from nemo_lmpo.parallel.logprobs import VocabularyPart, vocab_parallel_logprobs

HIDDEN, ROWS, POSITIONS = 16, 40, 23
PART = VocabularyPart(0, 37)


def make(dtype: torch.dtype) -> tuple[Tensor, torch.nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(dtype)
    weight = torch.nn.Parameter(torch.randn(ROWS, HIDDEN, generator=generator).to(dtype))
    return hidden, weight, torch.randint(0, 37, (POSITIONS,), generator=generator)


def exact_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    weight = weight[:37].detach().double().requires_grad_()
    torch.log_softmax(hidden.double() @ weight.T, dim=-1)[torch.arange(POSITIONS), targets].sum().backward()
    assert weight.grad is not None
    return torch.cat((weight.grad, torch.zeros(3, HIDDEN, dtype=torch.float64)))


@contextmanager
def products_in_float32() -> Iterator[list[str]]:
    """The operators with a result dtype, which only GPUs have, by their definition."""
    calls: list[str] = []

    def product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        calls.append("mm")
        return left.to(out_dtype) @ right.to(out_dtype)

    def add_product(
        total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, beta: Any = 1, alpha: Any = 1, out: Tensor
    ) -> Tensor:
        calls.append("addmm")
        assert beta == alpha == 1
        return out.copy_(total + left.to(dtype) @ right.to(dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype", product, "CPU")
        library.impl("addmm.dtype_out", add_product, "CPU")
        yield calls


@pytest.mark.parametrize("chunk_tokens", [5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
def test_adds_to_the_main_gradient(
    kernels: str, dtype: torch.dtype, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = make(dtype)
    weight.main_grad = torch.full((ROWS, HIDDEN), 0.5)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    if kernels == "gpu":
        monkeypatch.setattr(logprobs, "_keeps_float32", lambda tensor: tensor.dtype == torch.bfloat16)
    with products_in_float32() as calls:
        found = vocab_parallel_logprobs(hidden, weight, targets, part=PART, group=None, chunk_tokens=chunk_tokens)
        found.sum().backward()
    assert ("addmm" in calls) == ("mm" in calls) == (kernels == "gpu" and dtype == torch.bfloat16)
    expected = exact_gradient(hidden, weight, targets) + 0.5
    main: Tensor = weight.main_grad  # type: ignore[attr-defined]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (main.double() - expected).norm() < tolerance * (expected - 0.5).norm()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert weight.grad is not None, "megatron-core waits for every weight's gradient to come by"


def test_logits_are_not_rounded_where_the_kernel_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 logit of 16 to 32 errs by up to 0.06; in float32 the inputs' own rounding is all there is."""
    hidden, weight, targets = make(torch.bfloat16)
    hidden = hidden * 8
    monkeypatch.setattr(logprobs, "_keeps_float32", lambda tensor: tensor.dtype == torch.bfloat16)
    exact = torch.log_softmax(hidden.double() @ weight.detach()[:37].double().T, dim=-1)
    with products_in_float32():
        found = vocab_parallel_logprobs(hidden, weight, targets, part=PART, group=None)
    torch.testing.assert_close(found.double(), exact[torch.arange(POSITIONS), targets], rtol=1e-5, atol=1e-4)


def test_a_tied_weight_leaves_autograd_to_the_embedding() -> None:
    hidden, weight, targets = make(torch.float32)
    weight.main_grad = torch.zeros(ROWS, HIDDEN)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    found = vocab_parallel_logprobs(hidden, weight, targets, part=PART, group=None, used_elsewhere=True)
    (found.sum() + 3 * weight.sum()).backward()
    assert not weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert torch.equal(weight.grad, torch.full((ROWS, HIDDEN), 3.0)), "only the other use's gradient"
    main: Tensor = weight.main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(main.double(), exact_gradient(hidden, weight, targets), rtol=1e-5, atol=1e-5)


def test_a_gathered_weight_keeps_its_gradient_in_its_own_dtype() -> None:
    """FSDP of torch 2.15 asks for float32 before the reduction; twice the memory, with the same values."""
    hidden, weight, targets = make(torch.bfloat16)
    weight.grad_dtype = torch.float32
    vocab_parallel_logprobs(hidden, weight, targets, part=PART, group=None).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16

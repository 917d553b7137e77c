"""Whether the kernels that a run takes compute what they should: against float64 by definition, on small shapes.

A BF16 rounding errs by 2^-9 relative at most and half of that in the mean. Keys, scores, weights and results pass about
ten of them, which add up like a random walk: 0.4 %. A mask that is off by one, a head that reads another's keys or a
term that is missing errs by more than ten times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nemo_lmpo.doctor.findings import Finding
from nemo_lmpo.errors import first_line
from nemo_lmpo.model.attention_plan import plan_attention
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.parallel.context import attention_spans
from nemo_lmpo.parallel.logprobs import VocabularyPart, vocab_parallel_logprobs

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Largest distance from the definition, relative in the Euclidean norm."""
SEGMENTS = ((0, 40, 0, 0), (40, 70, 0, 40), (110, 30, 0, 40), (140, 60, 0, 0))
"""A prompt, two answers that see it, and a segment of its own: start, length, prefix start, prefix length."""
TOKENS, HEADS, GROUPS, HEAD_DIM = 200, 8, 2, 128
POSITIONS, HIDDEN, VOCABULARY, PADDING = 300, 256, 1000, 24


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance in the Euclidean norm."""
    expected = expected.double()
    return float((found.double().to(expected.device) - expected).norm() / expected.norm())


def check(name: str, values: Callable[[], list[tuple[Tensor, Tensor]]], dtype: torch.dtype) -> Finding:
    """Compare pairs of a computed and an expected tensor; a kernel that raises is a finding, too."""
    try:
        worst = max(distance(found, expected) for found, expected in values())
    except (RuntimeError, ImportError, AssertionError, NotImplementedError) as error:
        return Finding("parity", name, f"did not run: {first_line(error)}", "problem")
    bound = TOLERANCE[dtype]
    text = f"{worst:.1e} from float64 in {str(dtype).removeprefix('torch.')}, at most {bound:.0e} expected"
    return Finding("parity", name, text, "good" if worst <= bound else "problem")


def parity(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Attention, log-probabilities and optimizer, forward and backward."""
    yield check(f"attention ({kernels.attention})", lambda: attention_values(kernels, device, dtype), dtype)
    yield check("log-probabilities", lambda: logprob_values(device, dtype), dtype)
    yield check("optimizer", lambda: optimizer_values(device), torch.float32)


def random_tensors(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def attention_values(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, *, window: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of the run's attention module, and by definition; ``window``: newest keys a token sees."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_lmpo.model.build import attention_module

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        bf16=dtype == torch.bfloat16,
        window_size=None if window is None else (window - 1, 0),
    )
    module = attention_module(kernels)(config, 1)
    spans = attention_spans(torch.tensor(SEGMENTS, dtype=torch.int32), TOKENS, cp_rank=0, cp_size=1)
    plan = plan_attention(spans, TOKENS, cp_size=1)
    shapes = [(TOKENS, 1, heads, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)]
    *states, weight = random_tensors(device, dtype, *shapes, (TOKENS, 1, HEADS * HEAD_DIM))
    on_device = plan.map(lambda tensor: tensor.to(device))
    found = with_gradients(lambda *leaves: module(*leaves, attention_bias=on_device), states, weight)
    wide = [state.double().cpu() for state in states]
    expected = with_gradients(partial(attention_by_definition, window=window), wide, weight.double().cpu())
    return list(zip(found, expected, strict=True))


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output, and the gradients of its weighted sum."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    (output * weight).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def attention_by_definition(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    """Softmax over the keys that each token sees, token by token in a mask of the whole row."""
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    position = torch.zeros(TOKENS, dtype=torch.long)
    for start, length, prefix_start, prefix_length in SEGMENTS:
        seen[start : start + length, prefix_start : prefix_start + prefix_length] = True
        seen[start : start + length, start : start + length] = torch.ones(length, length, dtype=torch.bool).tril()
        position[start : start + length] = torch.arange(prefix_length, prefix_length + length)
    if window is not None:
        seen &= position[:, None] - position[None] < window
    keys, values = (states.squeeze(1).repeat_interleave(HEADS // GROUPS, dim=1) for states in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.squeeze(1), keys) * HEAD_DIM**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).reshape(TOKENS, 1, HEADS * HEAD_DIM)


def logprob_values(device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities of a padded vocabulary and their gradients, and by log-softmax."""
    hidden, matrix, weight = random_tensors(
        device, dtype, (POSITIONS, HIDDEN), (VOCABULARY + PADDING, HIDDEN), (POSITIONS,)
    )
    matrix = matrix * 0.1
    targets = torch.arange(POSITIONS, device=device) * 7 % VOCABULARY
    part = VocabularyPart(first=0, vocab_size=VOCABULARY)

    def ours(hidden: Tensor, matrix: Tensor) -> Tensor:
        return vocab_parallel_logprobs(hidden, matrix, targets, part=part, group=None, chunk_tokens=128)

    def definition(hidden: Tensor, matrix: Tensor) -> Tensor:
        logits = hidden @ matrix[:VOCABULARY].t()
        return logits.log_softmax(dim=-1).gather(1, targets.cpu()[:, None]).squeeze(1)

    found = with_gradients(ours, [hidden, matrix], weight.float())
    expected = with_gradients(definition, [hidden.double().cpu(), matrix.double().cpu()], weight.double().cpu())
    return list(zip(found, expected, strict=True))


def optimizer_values(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Weights after three steps of the AdamW that megatron-core takes here, and by its equations."""
    from megatron.core.optimizer import Adam

    rate, (first, second), eps, decay = 1e-2, (0.9, 0.99), 1e-8, 0.1
    start, *gradients = random_tensors(device, torch.float32, *[(1000,)] * 4)
    start = start * 0.01  # small beside the steps, so that its rounding does not count
    weight = torch.nn.Parameter(start.clone())
    optimizer = Adam([weight], lr=rate, betas=(first, second), eps=eps, weight_decay=decay)
    expected, mean, square = start.double().cpu(), torch.zeros(1000).double(), torch.zeros(1000).double()
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        wide = gradient.double().cpu()
        mean, square = first * mean + (1 - first) * wide, second * square + (1 - second) * wide**2
        unbiased = (square / (1 - second**step)).sqrt() + eps
        expected = expected * (1 - rate * decay) - rate * mean / (1 - first**step) / unbiased
    return [(weight.detach() - start, expected - start.double().cpu())]

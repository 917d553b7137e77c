"""Stands in for `transformer_engine_torch`, Transformer Engine's compiled module, on CPUs.

Only what training calls is here, each operation by its definition, computed in float32 or float64 and rounded once;
what FP8 adds is in `fp8.py`. Anything else that Transformer Engine calls raises and names itself. The arguments are
those of 2.11 and of 2.20, as their Python passes them; most of what the compiled module would refuse cannot be seen
here.
"""

from __future__ import annotations

import enum
from typing import Any, NoReturn

import torch
from torch import Tensor

from tests.flash_reference import Spans
from tests.te_emulation import fp8
from tests.te_emulation.fp8 import (  # noqa: F401  # asked of this module
    FP8BwdTensors,
    FP8FwdTensors,
    bgrad_quantize,
    create_empty_quantized_tensor,
    dequantize,
    fp8_transpose,
    quantize,
    swap_first_dims,
)
from tests.te_emulation.userbuffers import (  # noqa: F401  # asked of this module
    CommOverlap,
    CommOverlapHelper,
    CommOverlapP2P,
    CommOverlapType,
    after_product,
    before_product,
    device_supports_multicast,
    get_stream_priority_range,
    ubuf_built_with_mpi,
)

CALLS: dict[str, int] = {}
"""How often each operation ran in this process."""

_DTYPES = {
    "kByte": torch.uint8,
    "kInt32": torch.int32,
    "kFloat32": torch.float32,
    "kFloat16": torch.float16,
    "kBFloat16": torch.bfloat16,
    "kFloat8E4M3": torch.float8_e4m3fn,
    "kFloat8E5M2": torch.float8_e5m2,
}
DType: Any = enum.IntEnum("DType", {name: number for number, name in enumerate([*_DTYPES, "kFloat4E2M1"])})  # type: ignore[misc]


def _count(operation: str) -> None:
    CALLS[operation] = CALLS.get(operation, 0) + 1


def torch_dtype(dtype: Any) -> torch.dtype:
    """Torch's dtype of one of Transformer Engine's."""
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[DType(int(dtype)).name]


def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: object, out_dtype: Any,
    bias: Tensor | None, bias_dtype: object, gelu: bool, gelu_in: object, grad: bool, workspace: object, size: int,
    accumulate: bool, split_accumulator: bool, *, comm_overlap: CommOverlap | None, comm_type: Any,
    extra_output: Tensor | None, bulk_overlap: bool, alpha: float, beta: float | None,
) -> tuple[Tensor, Tensor | None, None, Tensor | None]:  # fmt: skip
    """The product of cuBLAS, whose matrices are column-major: read row-major, ``op(B) op(A)``.

    With ``accumulate`` it is added to ``out``. A ``bias`` is added in forward; with ``grad`` its gradient is given.
    """
    _count("gemm_accumulated" if accumulate else "gemm")
    assert quantizer is None
    assert not gelu
    assert alpha == 1.0
    assert beta in (None, 0.0, 1.0)
    before_product(comm_overlap, comm_type)
    if fp8.is_quantized(A) or fp8.is_quantized(B):
        _count("gemm_fp8")
        assert fp8.is_quantized(A), "both operands are in FP8, or none"
        assert fp8.is_quantized(B), "both operands are in FP8, or none"
        left, right = fp8.operand_matrix(B, by_rows=not transb), fp8.operand_matrix(A, by_rows=transa).t()
        bias_gradient = None  # was taken with the rounding
        assert not (grad and bias is not None)
    else:
        left, right = (operand.reshape(-1, operand.shape[-1]).float() for operand in (B, A))
        bias_gradient = left.sum(dim=0).to(torch_dtype(bias_dtype)) if grad and bias is not None else None
        left, right = left.t() if transb else left, right.t() if transa else right
    product = torch.mm(left, right)
    if bias is not None and not grad:
        product += bias.float()
    if not transb:
        product = product.reshape(*B.size()[:-1], -1)
    if out is None:
        assert not accumulate
        out = product.to(A.dtype if out_dtype is None else torch_dtype(out_dtype))
    else:
        assert out.shape == product.shape
        out.copy_(out.float() + product if accumulate else product)
    after_product(comm_overlap, comm_type, out, bulk=bulk_overlap, out=extra_output)
    return out, bias_gradient, None, extra_output


def te_general_grouped_gemm(
    A: list[Tensor], transa: bool, B: list[Tensor], transb: bool, out: list[Tensor], out_dtype: Any, rows: list[int],
    bias: object, bias_dtype: object, single_output: bool, gelu_in: object, grad: bool, workspaces: object, size: int,
    accumulate: bool, split_accumulator: bool, processors: int,
) -> object:  # fmt: skip
    """A product for each expert, into tensors of their own, or into rows of one."""
    _count("grouped_gemm")
    outputs = list(out[0].split(rows)) if single_output else out
    for left, right, result in zip(A, B, outputs, strict=True):
        if right.numel() or result.numel():
            generic_gemm(
                *(left, transa, right, transb, result, None, out_dtype, None, None, False, None, grad, None, 0),
                *(accumulate, split_accumulator),
                comm_overlap=None,
                comm_type=None,
                extra_output=None,
                bulk_overlap=False,
                alpha=1.0,
                beta=None,
            )
    return bias


def get_num_cublas_streams() -> int:
    """Streams over which the products of experts are dealt."""
    return 1


def rmsnorm_fwd(
    hidden: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: object, dtype: Any, margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    """The normed rows, no mean, and the inverse of each row's root mean square, which backward is given again."""
    _count("rmsnorm_fwd")
    assert quantizer is None or out is None
    inverse = torch.rsqrt(hidden.float().pow(2).mean(dim=-1) + eps)
    normed = (hidden.float() * inverse[..., None] * _gamma(weight, zero_centered)).to(torch_dtype(dtype))
    if quantizer is not None:
        return quantize(normed, quantizer), None, inverse.reshape(-1)
    return (normed if out is None else out.copy_(normed)), None, inverse.reshape(-1)


def rmsnorm_bwd(
    gradient: Tensor, hidden: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Of the rows and of the weight."""
    _count("rmsnorm_bwd")
    rows, upstream = (states.float().reshape(-1, states.shape[-1]) for states in (hidden, gradient))
    unit = rows * inverse.reshape(-1, 1)
    weighted = upstream * _gamma(weight, zero_centered)
    of_rows = inverse.reshape(-1, 1) * (weighted - unit * (weighted * unit).mean(dim=-1, keepdim=True))
    return of_rows.reshape(hidden.shape).to(hidden.dtype), (upstream * unit).sum(dim=0).to(weight.dtype)


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()


def fused_rope_forward(states: Tensor, angles: Tensor, starts: object, *form: Any) -> Tensor:
    """Turn the two halves of each head's first channels by ``angles`` of the token."""
    _count("fused_rope_forward")
    return _turn(states, angles, 1.0)


def fused_rope_backward(gradient: Tensor, angles: Tensor, starts: object, *form: Any) -> Tensor:
    """Turn back."""
    _count("fused_rope_backward")
    return _turn(gradient, angles, -1.0)


def _turn(states: Tensor, angles: Tensor, direction: float) -> Tensor:
    turned, rest = states.float().split((angles.shape[-1], states.shape[-1] - angles.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    angles = angles[: states.shape[0]].float()
    sine = torch.sin(angles) * direction
    turned = turned * torch.cos(angles) + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, rest), dim=-1).to(states.dtype)


def multi_tensor_l2norm(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, ``[1]``."""
    _count("multi_tensor_l2norm")
    assert not per_tensor
    squares = [tensor.double().pow(2).sum() for tensor in lists[0]]
    return torch.stack(squares).sum().sqrt().float().reshape(1), torch.empty(0)


def multi_tensor_scale(chunk: int, noop: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Write the first list times ``factor`` into the second."""
    _count("multi_tensor_scale")
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * factor)


def multi_tensor_adam(
    chunk: int, noop: Tensor, lists: list[list[Tensor]], rate: float, beta1: float, beta2: float, eps: float, step: int,
    decoupled: int, bias_correction: int, decay: float,
) -> None:  # fmt: skip
    """One AdamW step of gradients, parameters and both moments."""
    _count("multi_tensor_adam")
    assert decoupled
    assert len(lists) == 4
    first = 1.0 - beta1**step if bias_correction else 1.0
    second = 1.0 - beta2**step if bias_correction else 1.0
    for gradient, parameter, mean, square in zip(*lists, strict=True):
        gradient = gradient.float()
        mean.mul_(beta1).add_(gradient, alpha=1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        change = (mean / first) / ((square / second).sqrt() + eps) + decay * parameter.float()
        parameter.copy_(parameter.float() - rate * change)


def get_fused_attn_backend(*arguments: Any) -> Any:
    """Answer as for bfloat16 on Hopper, where cuDNN takes spans of any length.

    Newer versions ask with all of their parameters in one object, and want to hear why not, too.
    """
    _count("get_fused_attn_backend")
    backend = __getattr__("NVTE_Fused_Attn_Backend").NVTE_F16_arbitrary_seqlen
    return backend if len(arguments) > 1 else (backend, "")


def fused_attn_fwd(max_q: int, max_kv: int, training: bool, scale: float, dropout: float, *rest: Any) -> list[Tensor]:
    """Attention of each span to its keys, and what backward gets of it: the softmax's statistics and random state."""
    _count("fused_attn_fwd")
    assert dropout == 0.0
    states, spans = _spans(rest, (max_q, max_kv), scale)
    statistics = torch.zeros(*states[0].shape[:2], 1)
    return [spans.attended().to(states[0].dtype), statistics, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(max_q: int, max_kv: int, scale: float, dropout: float, *rest: Any) -> list[Tensor | None]:
    """Of queries, keys and values."""
    _count("fused_attn_bwd")
    assert dropout == 0.0
    states, spans = _spans(rest, (max_q, max_kv), scale)
    _, gradient = _tensors(rest)[5:7]
    gradients = spans.gradients(gradient.reshape(states[0].shape))
    return [*(part.to(state.dtype) for part, state in zip(gradients, states, strict=True)), None, None]


def _spans(arguments: tuple[Any, ...], longest: tuple[int, int], scale: float) -> tuple[tuple[Tensor, ...], Spans]:
    """Queries, keys and values of a call, and their spans.

    Versions have other forms (layouts of outputs and scales) between these arguments, whose order is the same in all.
    """
    chosen = {type(choice).__name__: choice.name for choice in arguments if isinstance(choice, _Choice)}
    # Keys and values that were gathered together lie in one tensor still.
    assert chosen["NVTE_QKV_Layout"] in ("NVTE_THD_THD_THD", "NVTE_THD_T2HD"), chosen
    assert chosen["NVTE_Bias_Type"] == "NVTE_NO_BIAS"
    assert chosen["NVTE_Mask_Type"] == "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK"
    assert chosen["NVTE_Softmax_Type"] == "NVTE_VANILLA_SOFTMAX"
    left, right = next(
        argument for argument in arguments if isinstance(argument, tuple | list)
    )  # the first is the window
    assert right == 0
    offsets_q, offsets_kv, query, key, value, *_ = _tensors(arguments)
    spans = Spans((query, key, value), (offsets_q, offsets_kv), longest, scale=scale, bounds=(left, 0))
    return (query, key, value), spans


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [argument for argument in arguments if isinstance(argument, Tensor)]


def get_cudnn_version() -> int:
    """9.19, as 91900."""
    return 91900


class _Choice(int):
    """A member of one of the compiled module's enumerations."""

    name: str


class _Choices(type):
    """Makes the members of an enumeration when they are asked for; the tables of Transformer Engine name them all."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        choice = cls(len(cls.__members__))
        choice.name = name
        setattr(cls, name, choice)
        return choice

    @property
    def __members__(cls) -> dict[str, _Choice]:
        """Those that were asked for: newer versions compare them with an enumeration of their own."""
        return {name: member for name, member in vars(cls).items() if isinstance(member, _Choice)}


def __getattr__(name: str) -> Any:
    """Enumerations and classes by their capital, operations by their small letter; these refuse to run."""
    if name.startswith("_"):
        raise AttributeError(name)
    found: Any = _Choices(name, (_Choice,), {}) if name[0].isupper() else _refuses(name)
    return globals().setdefault(name, found)


def _refuses(name: str) -> Any:
    def operation(*arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError(f"Transformer Engine calls {name}, which has no stand-in in {__name__}")

    operation.__name__ = name
    return operation

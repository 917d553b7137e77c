"""The parts of `transformer_engine_torch` that make and read FP8 numbers, by definition, on CPUs.

Quantizers and tensors are Transformer Engine's own Python classes; here is what their kernels compute. Rounding is
that of torch's FP8 dtypes (to the nearest, ties to even), after what does not fit was cut to the largest number. What
the compiled module checks of a product in FP8 is checked here, too.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
_DTYPES = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}

_FORWARD, _BACKWARD = ("INPUT", "WEIGHT", "OUTPUT"), ("GRAD_OUTPUT", "GRAD_INPUT")
FP8FwdTensors: Any = enum.IntEnum("FP8FwdTensors", [f"GEMM{n}_{part}" for n in (1, 2, 3) for part in _FORWARD], start=0)  # type: ignore[misc]
"""Places of a layer's quantizers in forward."""
FP8BwdTensors: Any = enum.IntEnum("FP8BwdTensors", [f"{part}{n}" for n in (1, 2, 3) for part in _BACKWARD], start=0)  # type: ignore[misc]
"""And in backward."""


def fp8_dtype(dtype: Any) -> torch.dtype:
    """Torch's dtype of one of Transformer Engine's."""
    return _DTYPES[dtype.name]


def scale_of(amax: Tensor, dtype: torch.dtype, *, power_of_2: bool, epsilon: float = 0.0) -> Tensor:
    """What numbers of the largest size ``amax`` are multiplied by before they are rounded; 1 where that is 0."""
    amax = amax.float().clamp_min(epsilon)
    scale = torch.finfo(dtype).max / amax
    scale = scale.clamp_max(torch.finfo(torch.float32).max)
    if power_of_2:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where((amax == 0) | ~amax.isfinite(), torch.ones_like(scale), scale)


def _codes(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return (numbers.float() * scale).clamp(-largest, largest).to(dtype).view(torch.uint8)


def _numbers(codes: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(dtype).float() * inverse


def _spread(scales: Tensor, shape: torch.Size, *, both: bool) -> Tensor:
    """A scale for each element: of its 128 columns, or of its block of 128 x 128."""
    wide = scales.repeat_interleave(BLOCK, dim=1)[:, : shape[1]]
    return wide.repeat_interleave(BLOCK, dim=0)[: shape[0]] if both else wide


def _blocks(matrix: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Codes of a matrix, and the inverse of each scale: of 128 columns of a row, or of a block of 128 x 128."""
    dtype, both = fp8_dtype(quantizer.dtype), quantizer.block_scaling_dim == 2
    rows, columns = matrix.shape
    padded = F.pad(matrix.float().abs(), (0, -columns % BLOCK, 0, -rows % BLOCK if both else 0))
    amax = padded.unflatten(1, (-1, BLOCK)).amax(dim=2)
    if both:
        amax = amax.unflatten(0, (-1, BLOCK)).amax(dim=1)
    scale = scale_of(amax, dtype, power_of_2=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon)
    return _codes(matrix, _spread(scale, matrix.shape, both=both), dtype), 1.0 / scale


def _is_blockwise(thing: Any) -> bool:
    return hasattr(thing, "block_scaling_dim") or hasattr(thing, "_is_2D_scaled")


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: object, pinned: object
) -> Any:
    """A tensor for a quantizer's numbers, of the usages that it is set to."""
    assert not pinned
    return _empty(quantizer, torch.Size(shape), dtype)


def _empty(quantizer: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    named: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "fake_dtype": dtype}
    if _is_blockwise(quantizer):
        kind = Float8BlockwiseQTensorStorage if quantizer.internal else float8_blockwise_tensor.Float8BlockwiseQTensor
        parts = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
        named |= dict.fromkeys(parts) | {"is_2D_scaled": quantizer.block_scaling_dim == 2}
        if hasattr(quantizer, "all_gather_usage"):
            named["data_format"] = _format(quantizer)
    else:
        kind = Float8TensorStorage if quantizer.internal else float8_tensor.Float8Tensor
        named |= {"data": None, "fp8_scale_inv": torch.empty(1)}
    if not quantizer.internal:
        named |= {"shape": shape, "dtype": dtype, "device": torch.device("cpu")}
    if "fake_dtype" not in _parameters():
        del named["fake_dtype"]
    made = kind(**named)
    _allocate(made, quantizer, shape)
    return made


def _parameters() -> set[str]:
    import inspect

    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    return set(inspect.signature(Float8TensorStorage.__new__).parameters)


def _format(quantizer: Any) -> Any:
    from tests.te_emulation import extension

    formats: Any = extension.Float8BlockScaleTensorFormat
    return formats.COMPACT if quantizer.all_gather_usage else formats.GEMM_READY


def _allocate(tensor: Any, quantizer: Any, shape: torch.Size) -> None:
    """Give a tensor the memory that its quantizer's usages want, and take what they do not."""

    def memory(name: str, wanted: bool, size: Any, dtype: torch.dtype = torch.uint8) -> None:
        present = getattr(tensor, name)
        if not wanted:
            setattr(tensor, name, None)
        elif present is None or present.shape != torch.Size(size):
            setattr(tensor, name, torch.empty(tuple(size), dtype=dtype))

    assert quantizer.rowwise_usage or quantizer.columnwise_usage
    if not _is_blockwise(quantizer):
        memory("_data", quantizer.rowwise_usage, shape)
        memory("_transpose", quantizer.columnwise_usage, (shape[-1], *shape[:-1]))
        tensor._transpose_invalid = not quantizer.columnwise_usage
        tensor._fp8_dtype = quantizer.dtype
        return
    rows, columns = quantizer.rowwise_usage, quantizer.columnwise_usage
    memory("_rowwise_data", rows, shape)
    memory("_rowwise_scale_inv", rows, quantizer.get_scale_shape(shape, False), torch.float32)
    memory("_columnwise_data", columns, quantizer.get_columnwise_shape(shape))
    memory("_columnwise_scale_inv", columns, quantizer.get_scale_shape(shape, True), torch.float32)
    if hasattr(quantizer, "all_gather_usage"):
        tensor._data_format = _format(quantizer)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """``tensor`` in the quantizer's form: a new one, or in place of what ``output`` holds."""
    assert noop is None
    assert tensor.dtype in (torch.float32, torch.bfloat16)
    result = _empty(quantizer, tensor.shape, tensor.dtype) if output is None else output
    if output is not None:
        _allocate(result, quantizer, tensor.shape)
    matrix = tensor.detach().reshape(-1, tensor.shape[-1])
    if _is_blockwise(quantizer):
        _fill_blocks(result, quantizer, matrix)
        return result
    dtype = fp8_dtype(quantizer.dtype)
    scale = _current_scale(matrix, quantizer, dtype)
    codes = _codes(matrix, scale, dtype)
    if result._data is not None:
        result._data.copy_(codes.view(result._data.shape))
    if result._transpose is not None:
        result._transpose.copy_(codes.t().reshape(result._transpose.shape))
    result._scale_inv.copy_(1.0 / scale)
    return result


def _current_scale(matrix: Tensor, quantizer: Any, dtype: torch.dtype) -> Tensor:
    """By the largest number of the tensor, or of all ranks' parts of it."""
    assert type(quantizer).__name__ == "Float8CurrentScalingQuantizer", "delayed scaling has no stand-in"
    amax = matrix.float().abs().amax().reshape(1)
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    return scale_of(amax, dtype, power_of_2=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon)


def _fill_blocks(result: Any, quantizer: Any, matrix: Tensor) -> None:
    compact, flat = getattr(quantizer, "all_gather_usage", False), quantizer.block_scaling_dim == 1
    if result._rowwise_data is not None:
        codes, inverse = _blocks(matrix, quantizer)
        result._rowwise_data.copy_(codes.view(result._rowwise_data.shape))
        _fill_corner(result._rowwise_scale_inv, inverse.t() if flat and not compact else inverse)
    if result._columnwise_data is not None:
        codes, inverse = _blocks(matrix.t(), quantizer)
        codes = codes.t() if flat and compact else codes
        result._columnwise_data.copy_(codes.reshape(result._columnwise_data.shape))
        _fill_corner(result._columnwise_scale_inv, inverse.t() if flat else inverse)


def _fill_corner(padded: Tensor, values: Tensor) -> None:
    """Scales lie in rows of a multiple of 4, whose rest nobody reads."""
    padded.fill_(torch.nan)[: values.shape[0], : values.shape[1]] = values


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """The numbers that a tensor with one scale stands for."""
    from tests.te_emulation.extension import torch_dtype

    return _numbers(tensor._data, tensor._scale_inv, fp8_dtype(tensor._fp8_dtype)).to(torch_dtype(dtype))


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of a bias, and that of the product in FP8."""
    bias = gradient.float().reshape(-1, gradient.shape[-1]).sum(dim=0).to(gradient.dtype)
    return bias, quantize(gradient, quantizer)


def fp8_transpose(codes: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """``[rows, columns]`` to ``[columns, rows]``, leading dimensions taken together."""
    turned = codes.reshape(-1, codes.shape[-1]).t().contiguous()
    return turned if out is None else out.copy_(turned.view(out.shape))


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Exchange the first two dimensions."""
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped.view(out.shape))


def is_quantized(operand: Any) -> bool:
    """Whether an operand of a product is in FP8."""
    return hasattr(operand, "_fp8_dtype")


def operand_matrix(operand: Any, *, by_rows: bool) -> Tensor:
    """What a product multiplies, ``[outer, inner]`` in float32: by rows, or by columns and so transposed.

    Hopper multiplies FP8 along rows only, so each direction has codes of its own, in blocks also other scales.
    """
    dtype = fp8_dtype(operand._fp8_dtype)
    if not _is_blockwise(operand):
        codes = operand._data if by_rows else operand._transpose
        assert codes is not None, f"a product wants the {'rows' if by_rows else 'columns'} of {operand}"
        assert by_rows or not operand._transpose_invalid
        matrix = codes.reshape(-1, codes.shape[-1]) if by_rows else codes.reshape(codes.shape[0], -1)
        numbers = _numbers(matrix, operand._scale_inv, dtype)
    else:
        codes, inverse = (
            (operand._rowwise_data, operand._rowwise_scale_inv)
            if by_rows
            else (operand._columnwise_data, operand._columnwise_scale_inv)
        )
        assert codes is not None, f"a product wants the {'rows' if by_rows else 'columns'} of a tensor of blocks"
        if hasattr(operand, "_data_format"):
            assert operand._data_format.name == "GEMM_READY"
        matrix = codes.reshape(-1, codes.shape[-1]) if by_rows else codes.reshape(codes.shape[0], -1)
        both = operand._is_2D_scaled
        outer, inner = (
            -(-size // BLOCK) if part else size for size, part in zip(matrix.shape, (both, True), strict=True)
        )
        scales = (inverse if both else inverse.t())[:outer, :inner]
        numbers = _numbers(matrix, _spread(scales, matrix.shape, both=both), dtype)
    assert matrix.shape[1] % 16 == 0, f"FP8 products sum over multiples of 16, not {matrix.shape[1]}"
    assert matrix.shape[0] % 8 == 0, f"FP8 matrices have multiples of 8 rows, not {matrix.shape[0]}"
    return numbers

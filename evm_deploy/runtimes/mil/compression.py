"""Rules of the MIL operations for quantisation: of activations in the program, and of weights in the file."""

from __future__ import annotations

from typing import Any

from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into, tensor

RULES: dict[str, Rule] = {}
rule = into(RULES)
INTEGERS = {"int8": (-128, 127), "uint8": (0, 255)}


def _along(parameter: Any, axis: int | None, rank: int) -> Any:
    """Reshape a scale or zero point (one value, or one per channel) so that it broadcasts along `axis`."""
    values = tensor(parameter).float()
    return values if values.numel() == 1 else values.reshape([-1 if i == axis else 1 for i in range(rank)])


@rule
def quantize(input: Any, scale: Any, output_dtype: str, zero_point: Any = 0, axis: int | None = None) -> Any:
    """Compute clip(round(input / scale) + zero_point), with halves rounded to even."""
    import torch

    if output_dtype not in INTEGERS:
        raise UnsupportedError(f"quantize to {output_dtype}")
    steps = (input / _along(scale, axis, input.dim())).round() + _along(zero_point, axis, input.dim())
    return steps.clamp(*INTEGERS[output_dtype]).to(getattr(torch, output_dtype))


@rule
def dequantize(input: Any, scale: Any, zero_point: Any = 0, axis: int | None = None) -> Any:
    """Compute (input - zero_point) * scale in float32."""
    return (input.float() - _along(zero_point, axis, input.dim())) * _along(scale, axis, input.dim())


@rule
def constexpr_affine_dequantize(quantized_data: Any, zero_point: Any, scale: Any, axis: int) -> Any:
    """Expand quantised weights: (quantized_data - zero_point) * scale in float32."""
    data = tensor(quantized_data)
    return (data.float() - _along(zero_point, axis, data.dim())) * _along(scale, axis, data.dim())


@rule
def constexpr_blockwise_shift_scale(data: Any, scale: Any, offset: Any = None) -> Any:
    """Expand blockwise quantised weights: (data - offset) * scale in float32.

    Each block of the data has its scale and offset. In every axis, the number of blocks divides the size of the data.
    """
    values = tensor(data).float()
    shifted = values if offset is None else values - _spread(tensor(offset).float(), values.shape)
    return shifted * _spread(scale, values.shape)


def _spread(blocks: Any, shape: Any) -> Any:
    """Repeat each value of `blocks` over its block, so that the result has `shape`."""
    for axis, size in enumerate(shape):
        blocks = blocks.repeat_interleave(size // blocks.shape[axis], axis)
    return blocks

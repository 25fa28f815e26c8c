"""Q/DQ nodes as the functions of torch by which ExecuTorch's delegates know int8 layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor

from evm_deploy.export.executorch.forms import refuse

OPS: Any = torch.ops.quantized_decomposed
INT8 = (-128, 127, torch.int8)


def quantize(x: Tensor, scale: Any, zero_point: int = 0, *, axis: int = 1, block_size: int = 0) -> Tensor:
    """QuantizeLinear of an activation to int8, with one scale."""
    if not isinstance(scale, float):
        refuse("the scale", scale, "one number")
    rounded: Tensor = OPS.quantize_per_tensor(x, scale, zero_point, *INT8)
    return rounded


def dequantize(x: Tensor, scale: Any, zero_point: int = 0, *, axis: int = 1, block_size: int = 0) -> Tensor:
    """DequantizeLinear of an int8 activation, with one scale."""
    if not isinstance(scale, float):
        refuse("the scale", scale, "one number")
    restored: Tensor = OPS.dequantize_per_tensor(x, scale, zero_point, *INT8)
    return restored


def dequantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    """DequantizeLinear of an int8 weight, with one scale for each output channel. zero_point: int64."""
    restored: Tensor = OPS.dequantize_per_channel(weight, scale, zero_point, axis, *INT8)
    return restored

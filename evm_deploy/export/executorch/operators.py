"""ONNX operators as functions on torch tensors: what a graph of fixed sizes becomes before it is lowered.

A function takes the inputs of a node, then its attributes by their names. Inputs that only choose a form, such as the
shape of a Reshape, are `static`: they must be constants, and come as lists of numbers. Functions follow the
specification of the ONNX operators, opsets 18 to 23; forms that no lowering is known for raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evm_deploy.export.executorch import layers, rounding, shapes
from evm_deploy.export.executorch.forms import Numbers, refuse

#: ONNX's numbers of element types -> torch's types.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}


@dataclass(frozen=True)
class Operator:
    """Function that computes a node. static: positions of the inputs that are constants, given as lists of numbers."""

    function: Callable[..., Any]
    static: tuple[int, ...] = ()


def clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """Clip to limits, each of which may be left out."""
    return x if low is None and high is None else torch.clamp(x, low, high)


def reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a reduction over axes, all without `axes`. function(x, axes, keepdim)."""

    def reduced(x: Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes and noop_with_empty_axes:
            return x
        return function(x, list(axes) if axes else list(range(x.dim())), bool(keepdims))

    return reduced


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """Multiply the elements of axes."""
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep)
    return x


def arg(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ArgMax or ArgMin: the first index."""

    def found(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if select_last_index:
            refuse("select_last_index", select_last_index, 0)
        return function(x, axis, bool(keepdims))

    return found


def top_k(x: Tensor, k: Numbers, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """TopK: values and indices."""
    values, indices = torch.topk(x, k[0], axis, bool(largest), bool(sorted))
    return values, indices


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Div; of integers, towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Mod, with the sign of the divisor, or with fmod of the dividend."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def cumulative_sum(x: Tensor, axis: int | Numbers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """CumSum along an axis."""
    if exclusive or reverse:
        refuse("exclusive or reverse", (exclusive, reverse), "neither")
    return torch.cumsum(x, axis if isinstance(axis, int) else axis[0])


def cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    """Cast to an element type."""
    if to not in DTYPES:
        refuse("the type", to, ", ".join(map(str, DTYPES.values())))
    return x.to(DTYPES[to])


def fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return an operator of any number of inputs, from one of two."""

    def folded(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return folded


OPERATORS: dict[str, Operator] = {
    "Abs": Operator(torch.abs),
    "Add": Operator(torch.add),
    "And": Operator(torch.logical_and),
    "ArgMax": Operator(arg(torch.argmax)),
    "ArgMin": Operator(arg(torch.argmin)),
    "AveragePool": Operator(layers.average_pool),
    "BatchNormalization": Operator(layers.batch_norm),
    "Cast": Operator(cast),
    "Ceil": Operator(torch.ceil),
    "Clip": Operator(clip, (1, 2)),
    "Concat": Operator(lambda *parts, axis: torch.cat(parts, axis)),
    "Conv": Operator(layers.conv),
    "ConvTranspose": Operator(layers.conv_transpose),
    "Cos": Operator(torch.cos),
    "CumSum": Operator(cumulative_sum, (1,)),
    "DepthToSpace": Operator(shapes.depth_to_space),
    "DequantizeLinear": Operator(rounding.dequantize, (1, 2)),
    "Div": Operator(divide),
    "Einsum": Operator(lambda *parts, equation: torch.einsum(equation, *parts)),
    "Elu": Operator(lambda x, *, alpha=1.0: F.elu(x, alpha)),
    "Equal": Operator(torch.eq),
    "Erf": Operator(torch.erf),
    "Exp": Operator(torch.exp),
    "Expand": Operator(shapes.expand, (1,)),
    "Flatten": Operator(shapes.flatten),
    "Floor": Operator(torch.floor),
    "Gather": Operator(shapes.gather, (1,)),
    "GatherElements": Operator(lambda x, index, *, axis=0: torch.gather(x, axis, index)),
    "GatherND": Operator(shapes.gather_nd),
    "Gelu": Operator(lambda x, *, approximate="none": F.gelu(x, approximate=approximate)),
    "Gemm": Operator(layers.gemm),
    "GlobalAveragePool": Operator(lambda x: x.mean(list(range(2, x.dim())), True)),
    "Greater": Operator(torch.gt),
    "GreaterOrEqual": Operator(torch.ge),
    "GroupNormalization": Operator(layers.group_norm),
    "HardSigmoid": Operator(lambda x, *, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1)),
    "HardSwish": Operator(F.hardswish),
    "Identity": Operator(lambda x: x),
    "InstanceNormalization": Operator(layers.instance_norm),
    "LayerNormalization": Operator(layers.layer_norm),
    "LeakyRelu": Operator(lambda x, *, alpha=0.01: F.leaky_relu(x, alpha)),
    "Less": Operator(torch.lt),
    "LessOrEqual": Operator(torch.le),
    "Log": Operator(torch.log),
    "LogSoftmax": Operator(lambda x, *, axis=-1: F.log_softmax(x, axis)),
    "MatMul": Operator(torch.matmul),
    "Max": Operator(fold(torch.maximum)),
    "MaxPool": Operator(layers.max_pool),
    "Min": Operator(fold(torch.minimum)),
    "Mish": Operator(F.mish),
    "Mod": Operator(modulo),
    "Mul": Operator(torch.mul),
    "Neg": Operator(torch.neg),
    "Not": Operator(torch.logical_not),
    "Or": Operator(torch.logical_or),
    "PRelu": Operator(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Pad": Operator(shapes.pad, (1, 2, 3)),
    "Pow": Operator(torch.pow),
    "QuantizeLinear": Operator(rounding.quantize, (1, 2)),
    "Reciprocal": Operator(torch.reciprocal),
    "ReduceL2": Operator(reduce(lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keep))), (1,)),
    "ReduceMax": Operator(reduce(torch.amax), (1,)),
    "ReduceMean": Operator(reduce(torch.mean), (1,)),
    "ReduceMin": Operator(reduce(torch.amin), (1,)),
    "ReduceProd": Operator(reduce(product), (1,)),
    "ReduceSum": Operator(reduce(torch.sum), (1,)),
    "ReduceSumSquare": Operator(reduce(lambda x, axes, keep: torch.sum(x * x, axes, keep)), (1,)),
    "Relu": Operator(F.relu),
    "Reshape": Operator(shapes.reshape, (1,)),
    "Resize": Operator(layers.resize, (1, 2, 3)),
    "Round": Operator(torch.round),
    "Sigmoid": Operator(torch.sigmoid),
    "Sign": Operator(torch.sign),
    "Sin": Operator(torch.sin),
    "Slice": Operator(shapes.slice_, (1, 2, 3, 4)),
    "Softmax": Operator(lambda x, *, axis=-1: F.softmax(x, axis)),
    "Softplus": Operator(F.softplus),
    "SpaceToDepth": Operator(shapes.space_to_depth),
    "Split": Operator(shapes.split, (1,)),
    "Sqrt": Operator(torch.sqrt),
    "Squeeze": Operator(shapes.squeeze, (1,)),
    "Sub": Operator(torch.sub),
    "Sum": Operator(fold(torch.add)),
    "Tanh": Operator(torch.tanh),
    "Tile": Operator(lambda x, repeats: x.repeat(list(repeats)), (1,)),
    "TopK": Operator(top_k, (1,)),
    "Transpose": Operator(shapes.transpose),
    "Unsqueeze": Operator(shapes.unsqueeze, (1,)),
    "Where": Operator(torch.where),
    "Xor": Operator(torch.logical_xor),
}

"""What each MIL operation computes, in torch: one rule per operation type.

A rule's parameters are the operation's inputs by their MIL names, with MIL's defaults. Tensors come as torch tensors,
float16 ones as float32; integer, boolean and string constants as Python values. A rule that meets a variant it does not
know raises UnsupportedError. The table of them all has those of `layout` and `compression`, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from evm_deploy.runtimes.mil import compression, layout
from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into, tensor

RULES: dict[str, Rule] = {}
rule = into(RULES)


def _elementwise() -> dict[str, Rule]:
    """The operations on x, or x and y, that torch has as one function."""
    import torch
    import torch.nn.functional as F

    one: dict[str, Callable[..., Any]] = {
        "exp": torch.exp,
        "identity": torch.clone,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": F.softplus,
        "sqrt": torch.sqrt,
        "tanh": torch.tanh,
    }
    two: dict[str, Callable[..., Any]] = {
        "add": torch.add,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "mul": torch.mul,
        "real_div": torch.true_divide,
        "sub": torch.sub,
    }
    rules: dict[str, Rule] = {name: lambda x, apply=apply: apply(x) for name, apply in one.items()}
    return rules | {name: lambda x, y, apply=apply: apply(tensor(x), tensor(y)) for name, apply in two.items()}


@rule
def gelu(x: Any, mode: str = "EXACT") -> Any:
    import torch
    import torch.nn.functional as F

    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(1.702 * x)  # SIGMOID_APPROXIMATION


@rule
def softmax(x: Any, axis: int = -1) -> Any:
    return x.softmax(axis)


@rule
def cast(x: Any, dtype: str) -> Any:
    import torch

    types = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
    if dtype not in types:
        raise UnsupportedError(f"cast to {dtype}")
    return x.to(types[dtype])


@rule
def layer_norm(
    x: Any, axes: Sequence[int] | None = None, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Any:
    axes = [axis % x.dim() for axis in (axes if axes is not None else range(x.dim()))]
    shape = [size if i in axes else 1 for i, size in enumerate(x.shape)]
    centred = x - x.mean(axes, keepdim=True)
    y = centred / (centred.square().mean(axes, keepdim=True) + epsilon).sqrt()
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@rule
def batch_norm(x: Any, mean: Any, variance: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Any:
    import torch.nn.functional as F

    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, float(epsilon))


@rule
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    import torch.nn.functional as F

    return F.linear(x, weight, bias)


@rule
def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


@rule
def conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Any:
    import torch.nn.functional as F

    convolutions = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    if x.dim() not in convolutions or pad_type not in ("valid", "custom"):
        raise UnsupportedError(f"conv of rank {x.dim()} with pad_type {pad_type}")
    if pad_type == "custom" and pad and any(pad):  # before and after by axis, the first axis first; torch: the last
        x = F.pad(x, [side for axis in reversed(range(0, len(pad), 2)) for side in pad[axis : axis + 2]])
    return convolutions[x.dim()](x, weight, bias, strides or 1, 0, dilations or 1, groups)


@rule
def reduce_sum(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    return x.sum(axes if axes is not None else list(range(x.dim())), keepdim=keep_dims)


@rule
def reduce_mean(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    return x.mean(axes if axes is not None else list(range(x.dim())), keepdim=keep_dims)


@rule
def classify(probabilities: Any, classes: Sequence[str]) -> Any:
    """(label, probabilities in the order of the classes)."""
    row = probabilities.reshape(-1)
    return classes[int(row.argmax())], row


@cache
def all_rules() -> dict[str, Rule]:
    """The whole table, the same each time."""
    return {**_elementwise(), **RULES, **layout.RULES, **compression.RULES}

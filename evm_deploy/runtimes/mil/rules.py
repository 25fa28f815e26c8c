"""Rules: computation of each MIL operation type in torch.

The parameters of a rule are the inputs of the operation, with MIL's names and defaults. Tensors are torch tensors, and
float16 tensors are passed as float32. Integer, boolean and string constants are Python values. A rule raises
UnsupportedError for an unknown variant of its operation. `all_rules` also contains the rules of `images`, `layout`,
`selection`, `scatter` and `compression`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from evm_deploy.runtimes.mil import compression, images, layout, scatter, selection
from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into, tensor

MODULES = (images, layout, selection, scatter, compression)  # with rules of their own
RULES: dict[str, Rule] = {}
rule = into(RULES)


def _elementwise() -> dict[str, Rule]:
    """Return the rules of all elementwise operations on x, or on x and y, that are a single function in torch."""
    import torch
    import torch.nn.functional as F

    one: dict[str, Callable[..., Any]] = {
        "abs": torch.abs,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "erf": torch.erf,
        "exp": torch.exp,
        "floor": torch.floor,
        "identity": torch.clone,
        "logical_not": torch.logical_not,
        "relu": torch.relu,
        "relu6": F.relu6,
        "round": torch.round,
        "sigmoid": torch.sigmoid,
        "sign": torch.sign,
        "silu": F.silu,
        "sin": torch.sin,
        "softplus": F.softplus,
        "square": torch.square,
        "sqrt": torch.sqrt,
        "tanh": torch.tanh,
    }
    two: dict[str, Callable[..., Any]] = {
        "add": torch.add,
        "equal": torch.eq,
        "floor_div": torch.floor_divide,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "mod": torch.remainder,
        "mul": torch.mul,
        "not_equal": torch.ne,
        "pow": torch.pow,
        "real_div": torch.true_divide,
        "sub": torch.sub,
    }
    rules: dict[str, Rule] = {name: lambda x, apply=apply: apply(tensor(x)) for name, apply in one.items()}
    return rules | {name: lambda x, y, apply=apply: apply(tensor(x), tensor(y)) for name, apply in two.items()}


@rule
def leaky_relu(x: Any, alpha: Any = 0.01) -> Any:
    """Compute x, or alpha x where x is negative."""
    import torch.nn.functional as F

    return F.leaky_relu(x, float(alpha))


@rule
def sigmoid_hard(x: Any, alpha: Any = 0.2, beta: Any = 0.5) -> Any:
    """Compute alpha x + beta, limited to 0..1."""
    return (float(alpha) * x + float(beta)).clamp(0, 1)


@rule
def rsqrt(x: Any, epsilon: Any = 1e-12) -> Any:
    """Compute 1 / sqrt(x + epsilon)."""
    return (x + epsilon).rsqrt()


@rule
def log(x: Any, epsilon: Any = 1e-45) -> Any:
    """Compute the natural logarithm of x + epsilon."""
    return (x + epsilon).log()


@rule
def clip(x: Any, alpha: Any, beta: Any) -> Any:
    """Limit the values to alpha..beta."""
    return x.clamp(float(alpha), float(beta))


@rule
def cumsum(x: Any, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Any:
    """Compute the running sum along an axis. Raises UnsupportedError for an exclusive or reversed one."""
    if exclusive or reverse:
        raise UnsupportedError("cumsum that is exclusive or reversed")
    return x.cumsum(axis)


@rule
def gelu(x: Any, mode: str = "EXACT") -> Any:
    """Compute GELU exactly, or with its tanh or sigmoid approximation."""
    import torch
    import torch.nn.functional as F

    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(1.702 * x)  # SIGMOID_APPROXIMATION


@rule
def softmax(x: Any, axis: int = -1) -> Any:
    """Compute the softmax along an axis."""
    return x.softmax(axis)


@rule
def cast(x: Any, dtype: str) -> Any:
    """Convert to another dtype. float16 stays float32 here: the program rounds its declared results.

    Whole numbers of 16 bits stay int32: they are indices, which coremltools makes small where they fit.
    """
    import torch

    types = {
        **dict.fromkeys(("fp16", "fp32"), torch.float32),
        **dict.fromkeys(("int32", "int16", "uint16"), torch.int32),
        "bool": torch.bool,
    }
    if dtype not in types:
        raise UnsupportedError(f"cast to {dtype}")
    return x.to(types[dtype])


@rule
def layer_norm(
    x: Any, axes: Sequence[int] | None = None, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Any:
    """Normalise over `axes` (all axes if None), then scale by gamma and shift by beta."""
    axes = [axis % x.dim() for axis in (axes if axes is not None else range(x.dim()))]
    shape = [size if i in axes else 1 for i, size in enumerate(x.shape)]
    centred = x - x.mean(axes, keepdim=True)
    y = centred / (centred.square().mean(axes, keepdim=True) + epsilon).sqrt()
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@rule
def batch_norm(x: Any, mean: Any, variance: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Any:
    """Normalise each channel (axis 1) with the given mean and variance, then scale by gamma and shift by beta."""
    import torch.nn.functional as F

    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, float(epsilon))


@rule
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Compute x @ weight.T + bias."""
    import torch.nn.functional as F

    return F.linear(x, weight, bias)


@rule
def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False) -> Any:
    """Multiply matrices, after optionally swapping the last two axes of x or y."""
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
    """Convolve in 1, 2 or 3 spatial dimensions. pad_type: `valid`, `custom` or `same`; UnsupportedError for others."""
    import torch.nn.functional as F

    convolutions = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    if x.dim() not in convolutions:
        raise UnsupportedError(f"conv of rank {x.dim()}")
    between = dilations or [1] * (x.dim() - 2)
    windows = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], between, strict=True)]
    x = images.padded(x, "conv", pad_type, pad, windows, strides)
    return convolutions[x.dim()](x, weight, bias, strides or 1, 0, between, groups)


@rule
def reduce_sum(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    """Compute the sum over `axes`, or over all axes if None."""
    return x.sum(axes if axes is not None else list(range(x.dim())), keepdim=keep_dims, dtype=x.dtype)


@rule
def reduce_mean(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    """Compute the mean over `axes`, or over all axes if None."""
    return x.mean(axes if axes is not None else list(range(x.dim())), keepdim=keep_dims)


@rule
def reduce_max(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    """Compute the largest value over `axes`, or over all axes if None."""
    return x.amax(axes if axes is not None else list(range(x.dim())), keepdim=keep_dims)


@rule
def reduce_min(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    """Compute the smallest value over `axes`, or over all axes if None."""
    return x.amin(axes if axes is not None else list(range(x.dim())), keepdim=keep_dims)


@rule
def reduce_l2_norm(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    """Compute the root of the sum of squares over `axes`, or over all axes if None."""
    return reduce_sum(x.square(), axes, keep_dims).sqrt()


@rule
def reduce_log_sum_exp(x: Any, axes: Sequence[int] | None = None, keep_dims: bool = False) -> Any:
    """Return the logarithm of the sum of the exponentials over `axes`, by default all."""
    import torch

    return torch.logsumexp(x, tuple(axes if axes is not None else range(x.dim())), keepdim=keep_dims)


@rule
def instance_norm(x: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Any:
    """Normalise each channel (axis 1) of each image by its own mean and variance, then scale and shift."""
    import torch.nn.functional as F

    return F.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


@rule
def einsum(values: Sequence[Any], equation: str) -> Any:
    """Multiply and sum tensors as the equation says."""
    import torch

    return torch.einsum(equation, *values)


@rule
def classify(probabilities: Any, classes: Sequence[str]) -> Any:
    """Return the most probable label, and the row of probabilities in the order of the classes."""
    row = probabilities.reshape(-1)
    return classes[int(row.argmax())], row


@cache
def all_rules() -> dict[str, Rule]:
    """Return the rules of all operations: MIL operation type -> rule. Every call returns the same table."""
    return {**_elementwise(), **RULES, **{name: each for module in MODULES for name, each in module.RULES.items()}}

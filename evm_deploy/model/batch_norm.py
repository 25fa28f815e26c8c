"""Folding of BatchNorm into the convolution before it, shared by torch modules and ONNX graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.floating[Any]]


def folded(
    weight: Array, bias: Array | None, scale: Array, shift: Array, mean: Array, variance: Array, epsilon: float
) -> tuple[Array, Array]:
    """Return the weight (out, ..) and the bias (out,) of a convolution with the BatchNorm after it folded in.

    The result has the dtype of `weight`; the arithmetic is float64. `epsilon` is rounded to float32, the type that ONNX
    stores, so that a module and its graph give the same bits.
    """
    dtype = weight.dtype
    wide = [value.astype(np.float64) for value in (scale, shift, mean, variance)]
    factor = wide[0] / np.sqrt(wide[3] + float(np.float32(epsilon)))
    by_output = factor.reshape(-1, *[1] * (weight.ndim - 1))
    offset = (0 if bias is None else bias.astype(np.float64)) - wide[2]
    return (weight * by_output).astype(dtype), (offset * factor + wide[1]).astype(dtype)


def folded_modules(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Apply `folded` to a torch convolution of any rank and the BatchNorm, in eval mode, that follows it."""
    import torch

    def array(value: Any, default: float = 0.0) -> Array:
        have: Array = np.full(norm.running_mean.shape, default) if value is None else value.detach().numpy()
        return have

    weight, bias = folded(
        array(conv.weight),
        array(conv.bias),
        array(norm.weight, 1.0),
        array(norm.bias),
        array(norm.running_mean),
        array(norm.running_var),
        norm.eps,
    )
    return torch.from_numpy(weight), torch.from_numpy(bias)

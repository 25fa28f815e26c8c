"""ONNX operators with weights or windows, as functions on torch tensors (`operators.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evm_deploy.export.executorch.forms import Floats, Numbers, refuse


def pair_pads(pads: Numbers | None, axes: int) -> tuple[list[int], list[int] | None]:
    """Split ONNX's pads (all begins, then all ends). Returns equal pads by axis, and torch's own for unequal ones."""
    begins, ends = list((pads or [0] * 2 * axes)[:axes]), list((pads or [0] * 2 * axes)[axes:])
    if begins == ends:
        return begins, None
    return [0] * axes, [pad for both in zip(reversed(begins), reversed(ends), strict=True) for pad in both]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 1,
    strides: Numbers | None = None,
    pads: Numbers | None = None,
    dilations: Numbers | None = None,
    kernel_shape: Numbers | None = None,
    auto_pad: str = "NOTSET",
) -> Tensor:
    """Conv over one, two or three axes."""
    axes = weight.dim() - 2
    if auto_pad not in ("NOTSET", "VALID"):
        refuse("auto_pad", auto_pad, "NOTSET")
    equal, unequal = pair_pads(pads, axes)
    if unequal:
        x = F.pad(x, unequal)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    ones = [1] * axes
    return function(x, weight, bias, list(strides or ones), equal, list(dilations or ones), group)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: int = 1,
    strides: Numbers | None = None,
    pads: Numbers | None = None,
    output_padding: Numbers | None = None,
    dilations: Numbers | None = None,
    kernel_shape: Numbers | None = None,
    auto_pad: str = "NOTSET",
) -> Tensor:
    """ConvTranspose over one or two axes, with equal pads."""
    axes = weight.dim() - 2
    if auto_pad != "NOTSET":
        refuse("auto_pad", auto_pad, "NOTSET")
    equal, unequal = pair_pads(pads, axes)
    if unequal:
        refuse("pads", pads, "the same at both ends")
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[axes]
    ones, zeros = [1] * axes, [0] * axes
    more = list(output_padding or zeros)
    return function(x, weight, bias, list(strides or ones), equal, more, group, list(dilations or ones))


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Gemm: alpha A B + beta C."""
    a = a.transpose(0, 1) if transA else a
    if alpha == 1 and transB and (c is None or (beta == 1 and c.dim() == 1)):
        return F.linear(a, b, c)
    y = torch.matmul(a, b.transpose(0, 1) if transB else b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """LayerNormalization over the axes from `axis` on."""
    shape = list(x.shape[axis:])
    return F.layer_norm(x, shape, scale.reshape(shape), None if bias is None else bias.reshape(shape), epsilon)


def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5, momentum: float = 0.9
) -> Tensor:
    """BatchNormalization in inference."""
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """GroupNormalization (opset 21: scale and bias of each channel)."""
    if scale.numel() != x.shape[1]:
        refuse("the number of scales", scale.numel(), x.shape[1])
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """InstanceNormalization."""
    return F.group_norm(x, x.shape[1], scale, bias, epsilon)


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Numbers,
    strides: Numbers | None = None,
    pads: Numbers | None = None,
    dilations: Numbers | None = None,
    ceil_mode: int = 0,
    storage_order: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:
    """MaxPool over one or two axes."""
    if auto_pad not in ("NOTSET", "VALID"):
        refuse("auto_pad", auto_pad, "NOTSET")
    axes = len(kernel_shape)
    equal, unequal = pair_pads(pads, axes)
    if unequal:
        x = F.pad(x, unequal, value=-math.inf)
    function = {1: F.max_pool1d, 2: F.max_pool2d}[axes]
    ones = [1] * axes
    return function(
        x, list(kernel_shape), list(strides or ones), equal, list(dilations or ones), ceil_mode=bool(ceil_mode)
    )


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Numbers,
    strides: Numbers | None = None,
    pads: Numbers | None = None,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
    dilations: Numbers | None = None,
) -> Tensor:
    """AveragePool over one or two axes, with equal pads."""
    axes = len(kernel_shape)
    equal, unequal = pair_pads(pads, axes)
    if unequal or auto_pad not in ("NOTSET", "VALID") or max(dilations or [1]) > 1:
        refuse("a form of padding or dilation", (pads, auto_pad, dilations), "equal pads")
    function: Any = {1: F.avg_pool1d, 2: F.avg_pool2d}[axes]
    pooled: Tensor = function(
        x, list(kernel_shape), list(strides or [1] * axes), equal, bool(ceil_mode), bool(count_include_pad)
    )
    return pooled


def resize(
    x: Tensor,
    roi: Any = None,
    scales: Floats | None = None,
    sizes: Numbers | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    antialias: int = 0,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
) -> Tensor:
    """Resize of images (b, C, H, W), in the forms that torch's interpolate has."""
    wanted = [round(size * scale) for size, scale in zip(x.shape, scales or [], strict=False)] if scales else sizes
    form = (mode, coordinate_transformation_mode, nearest_mode if mode == "nearest" else "", antialias, exclude_outside)
    known: Mapping[Any, tuple[str, bool | None]] = {
        ("nearest", "asymmetric", "floor", 0, 0): ("nearest", None),
        ("linear", "half_pixel", "", 0, 0): ("bilinear", False),
        ("linear", "pytorch_half_pixel", "", 0, 0): ("bilinear", False),
        ("linear", "align_corners", "", 0, 0): ("bilinear", True),
        ("cubic", "half_pixel", "", 0, 0): ("bicubic", False),
        ("cubic", "align_corners", "", 0, 0): ("bicubic", True),
    }
    if not wanted or x.dim() != 4 or list(wanted[:2]) != list(x.shape[:2]) or cubic_coeff_a != -0.75:
        refuse("the resize", (list(x.shape), wanted), "H and W of (b, C, H, W)")
    if form not in known:
        refuse("the form of the resize", form, "; ".join(map(str, known)))
    how, corners = known[form]
    return F.interpolate(x, size=list(wanted or [])[2:], mode=how, align_corners=corners)

"""Rules of operations on images (b, C, H, W): pooling, resizing, transposed convolution, pixels into channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule
def pixel_shuffle(x: Any, upscale_factor: int) -> Any:
    """Move channels into pixels: (b, C r r, H, W) -> (b, C, H r, W r)."""
    import torch.nn.functional as F

    return F.pixel_shuffle(x, int(upscale_factor))


@rule
def pixel_unshuffle(x: Any, downscale_factor: int) -> Any:
    """Move pixels into channels: (b, C, H r, W r) -> (b, C r r, H, W)."""
    import torch.nn.functional as F

    return F.pixel_unshuffle(x, int(downscale_factor))


@rule
def upsample_nearest_neighbor(x: Any, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Any:
    """Repeat rows and columns. The factors are whole numbers, else UnsupportedError."""
    rows, columns = float(scale_factor_height), float(scale_factor_width)
    if not (rows.is_integer() and columns.is_integer()):
        raise UnsupportedError(f"upsample_nearest_neighbor by {rows} x {columns}")
    return x.repeat_interleave(int(rows), -2).repeat_interleave(int(columns), -1)


@rule
def upsample_bilinear(
    x: Any,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Any:
    """Enlarge by linear interpolation between corners or between centres of pixels; UnsupportedError for neither."""
    import torch.nn.functional as F

    if not align_corners and half_pixel_centers is False:
        raise UnsupportedError("upsample_bilinear without align_corners and half_pixel_centers")
    factors = [float(scale_factor_height), float(scale_factor_width)]
    size = [int(side * factor) for side, factor in zip(x.shape[-2:], factors, strict=True)]
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


@rule
def resize_bilinear(
    x: Any, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Any:
    """Resize by linear interpolation. UnsupportedError for other modes than aligned corners and offset corners."""
    import torch.nn.functional as F

    modes = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}
    if sampling_mode not in modes:
        raise UnsupportedError(f"resize_bilinear with sampling_mode {sampling_mode}")
    size = (int(target_size_height), int(target_size_width))
    return F.interpolate(x, size, mode="bilinear", align_corners=modes[sampling_mode])


@rule
def max_pool(
    x: Any,
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> Any:
    """Compute the largest value of each window. Padding counts as -Inf."""
    import torch.nn.functional as F

    x = padded(x, "max_pool", pad_type, pad, kernel_sizes, strides, float("-inf"))
    return _pool(F.max_pool1d, F.max_pool2d, x)(x, kernel_sizes, strides or 1, ceil_mode=ceil_mode)


@rule
def avg_pool(
    x: Any,
    kernel_sizes: Sequence[int],
    strides: Sequence[int] | None = None,
    pad_type: str = "valid",
    pad: Sequence[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Any:
    """Compute the mean of each window, with or without its padding. UnsupportedError for ceil_mode."""
    import torch
    import torch.nn.functional as F

    if ceil_mode:
        raise UnsupportedError("avg_pool with ceil_mode")
    pool, around = _pool(F.avg_pool1d, F.avg_pool2d, x), (pad_type, pad, kernel_sizes, strides)
    y = pool(padded(x, "avg_pool", *around), kernel_sizes, strides or 1)
    if not exclude_padding_from_average:
        return y
    return y / pool(padded(torch.ones_like(x), "avg_pool", *around), kernel_sizes, strides or 1)


@rule
def conv_transpose(
    x: Any,
    weight: Any,
    bias: Any = None,
    pad: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pad_type: str = "valid",
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    groups: int = 1,
) -> Any:
    """Transpose a convolution: each value of x adds `weight` to the result, of which `pad` is cut off.

    weight: (C_in, C_out / groups, ..). UnsupportedError for an output_shape that is not the natural one.
    """
    import torch.nn.functional as F

    rank = x.dim() - 2
    if rank not in (1, 2) or pad_type not in ("valid", "custom"):
        raise UnsupportedError(f"conv_transpose of rank {x.dim()} with pad_type {pad_type}")
    transpose = F.conv_transpose1d if rank == 1 else F.conv_transpose2d
    y = transpose(x, weight, bias, strides or 1, 0, 0, groups, dilations or 1)
    sides = list(pad) if pad and pad_type == "custom" else [0] * 2 * rank
    for axis in range(rank):
        before, after = sides[2 * axis : 2 * axis + 2]
        y = y.narrow(axis + 2, before, y.shape[axis + 2] - before - after)
    if output_shape is not None and list(output_shape) != list(y.shape):
        raise UnsupportedError(f"conv_transpose to {list(output_shape)}, by nature {list(y.shape)}")
    return y


def padded(
    x: Any,
    op: str,
    pad_type: str,
    pad: Sequence[int] | None,
    windows: Sequence[int],
    strides: Sequence[int] | None,
    value: float = 0.0,
) -> Any:
    """Pad the last axes of x for windows that an operation moves over them.

    pad_type: `valid` for none, `custom` for `pad`, `same` for a result of ceil(size / stride), an odd side after.
    Raises UnsupportedError for another one.
    """
    import torch.nn.functional as F

    sides = list(pad or []) if pad_type == "custom" else []
    if pad_type == "same":
        for size, window, stride in zip(x.shape[2:], windows, strides or [1] * len(windows), strict=True):
            total = max((-(-size // stride) - 1) * stride + window - size, 0)
            sides += [total // 2, total - total // 2]
    elif pad_type not in ("valid", "custom"):
        raise UnsupportedError(f"{op} with pad_type {pad_type}")
    # MIL pads the first axis first, torch the last
    inner_first = [side for axis in reversed(range(0, len(sides), 2)) for side in sides[axis : axis + 2]]
    return F.pad(x, inner_first, value=value) if any(sides) else x


def _pool(of_rows: Any, of_images: Any, x: Any) -> Any:
    if x.dim() not in (3, 4):
        raise UnsupportedError(f"pooling of rank {x.dim()}")
    return of_rows if x.dim() == 3 else of_images

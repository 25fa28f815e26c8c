"""Rules of the MIL operations that only move values: reshape, transpose, pad, split, slice and the like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evm_deploy.runtimes.mil.rule import Rule, UnsupportedError, into, tensor

RULES: dict[str, Rule] = {}
rule = into(RULES)


@rule
def reshape(x: Any, shape: Sequence[int]) -> Any:
    """Reshape; -1 is inferred. Raises UnsupportedError for 0, which means "copy the size" in MIL."""
    if 0 in shape:
        raise UnsupportedError("reshape that copies sizes (0 in its shape)")
    return x.reshape(shape)


@rule
def transpose(x: Any, perm: Sequence[int]) -> Any:
    """Reorder the axes: axis i of the result is axis perm[i] of `x`."""
    return x.permute(perm)


@rule
def reverse(x: Any, axes: Sequence[int] | None = None) -> Any:
    """Reverse the order along `axes`, or along all axes if None."""
    return x.flip(list(axes) if axes is not None else list(range(x.dim())))


@rule
def expand_dims(x: Any, axes: Sequence[int]) -> Any:
    """Insert axes of size 1. `axes` count in the shape of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@rule
def squeeze(x: Any, axes: Sequence[int] | None = None) -> Any:
    """Remove axes of size 1: all of them if `axes` is None."""
    return x.squeeze(tuple(axes) if axes is not None else tuple(range(x.dim())))


@rule
def tile(x: Any, reps: Sequence[int]) -> Any:
    """Repeat the whole tensor reps[i] times along axis i."""
    return x.repeat(*reps)


@rule
def pad(x: Any, pad: Sequence[int], mode: str = "constant", constant_val: Any = 0.0) -> Any:
    """Pad the last axes with a constant, with the border, or with its reflection. pad: (before, after) per axis."""
    import torch
    import torch.nn.functional as F

    pairs = list(zip(pad[::2], pad[1::2], strict=True))
    if mode == "constant":
        return F.pad(x, [size for pair in reversed(pairs) for size in pair], value=float(constant_val))
    if mode not in ("replicate", "reflect"):
        raise UnsupportedError(f"pad with mode {mode}")
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        last = x.shape[axis] - 1
        at = torch.arange(-before, last + 1 + after)
        x = x.index_select(axis, at.clamp(0, last) if mode == "replicate" else last - (last - at.abs()).abs())
    return x


@rule
def split(
    x: Any, axis: int, num_splits: int | None = None, split_sizes: Sequence[int] | None = None
) -> tuple[Any, ...]:
    """Split along an axis, into parts of `split_sizes`, or into `num_splits` equal parts."""
    sizes = list(split_sizes) if split_sizes is not None else [x.shape[axis] // (num_splits or 1)] * (num_splits or 1)
    return tuple(x.split(sizes, axis))


@rule
def concat(values: Sequence[Any], axis: int, interleave: bool = False) -> Any:
    """Concatenate along an axis. interleave: first slices of all values, then second slices, and so on.

    A scalar counts as one element.
    """
    import torch

    if interleave:
        axis = axis % values[0].dim()
        return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)
    parts = [tensor(value) for value in values]
    return torch.cat([part if part.dim() else part.reshape(1) for part in parts], axis)


@rule
def stack(values: Sequence[Any], axis: int) -> Any:
    """Stack tensors of equal shape along a new axis."""
    import torch

    return torch.stack(list(values), axis)


@rule
def slice_by_size(x: Any, begin: Sequence[int], size: Sequence[int]) -> Any:
    """Cut out size[i] elements from begin[i] on along each axis; a size of -1 takes all remaining elements."""
    return x[tuple(slice(at, None if n == -1 else at + n) for at, n in zip(begin, size, strict=True))]


@rule
def slice_by_index(
    x: Any,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Any:
    """Slice from begin[i] to end[i] with stride[i] along each axis.

    begin_mask, end_mask: ignore begin[i] or end[i], and slice up to that end of the axis. squeeze_mask: take only the
    element at begin[i], and drop the axis. Raises UnsupportedError for strides below 1.
    """
    none = [False] * x.dim()
    index: list[slice | int] = []
    for i, (first, last) in enumerate(zip(begin, end, strict=True)):
        step = stride[i] if stride is not None else 1
        if step < 1:
            raise UnsupportedError(f"slice_by_index with stride {step}")
        if (squeeze_mask or none)[i]:
            index.append(first)
        else:
            index.append(
                slice(None if (begin_mask or none)[i] else first, None if (end_mask or none)[i] else last, step)
            )
    return x[tuple(index)]


@rule
def crop(x: Any, crop_height: Sequence[int], crop_width: Sequence[int]) -> Any:
    """Cut (before, after) rows and columns off (.., H, W)."""
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@rule
def shape(x: Any) -> Any:
    """Return the sizes of all dimensions."""
    return tensor(list(tensor(x).shape))


@rule
def fill(shape: Any, value: Any = 0.0) -> Any:
    """Return a tensor that holds one value."""
    return tensor(value).expand(tensor(shape).tolist()).clone()


@rule
def fill_like(ref_tensor: Any, value: Any = 0.0) -> Any:
    """Return a tensor of the same shape that holds one value."""
    return tensor(value).expand(tensor(ref_tensor).shape).clone()


@rule
def band_part(x: Any, lower: int = -1, upper: int = -1) -> Any:
    """Keep the diagonal of each matrix, `lower` diagonals below and `upper` above it; all of them for -1."""
    import torch

    kept = torch.tril(x, upper) if upper >= 0 else x
    return torch.triu(kept, -lower) if lower >= 0 else kept

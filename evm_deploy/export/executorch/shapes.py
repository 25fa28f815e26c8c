"""ONNX operators that move elements, as functions on torch tensors (`operators.py`)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evm_deploy.export.executorch.forms import Floats, Numbers, refuse


def reshape(x: Tensor, shape: Numbers, *, allowzero: int = 0) -> Tensor:
    """Reshape; 0 keeps a size."""
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape)])


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to two axes."""
    axis = axis % (x.dim() + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def transpose(x: Tensor, *, perm: Numbers | None = None) -> Tensor:
    """Transpose; without perm, reverse the axes."""
    return x.permute(list(perm) if perm else list(reversed(range(x.dim()))))


def unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    """Unsqueeze at axes of the result."""
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    """Squeeze axes of one element, all without `axes`."""
    given = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes]
    return x.reshape([size for i, size in enumerate(x.shape) if i not in given or (axes is None and size != 1)])


def gather(x: Tensor, indices: Any, *, axis: int = 0) -> Tensor:
    """Gather slices along an axis. indices: a number, or nested lists of numbers."""
    size = x.shape[axis]
    if isinstance(indices, int):
        return x.select(axis, indices % size)
    index = torch.tensor(indices) % size
    taken = x.index_select(axis, index.flatten())
    axis = axis % x.dim()
    return taken.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """GatherND: the last axis of indices is a place in the axes of x behind the `batch_dims` that both share."""
    rank = indices.dim() - 1
    own = [torch.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(rank)]) for i in range(batch_dims)]
    return x[(*own, *indices.unbind(-1))]


def split(
    x: Tensor, sizes: Numbers | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    """Split along an axis, into parts of these sizes, or into equal parts of which the last may be smaller."""
    if sizes is None:
        if not num_outputs:
            refuse("num_outputs", num_outputs, "the number of outputs")
        return torch.split(x, -(-x.shape[axis] // (num_outputs or 1)), axis)
    return torch.split(x, list(sizes), axis)


def slice_(
    x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Tensor:
    """Slice along axes; a negative step reads backwards."""
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = (axes[i] if axes else i) % x.dim(), steps[i] if steps else 1
        if step < 0:
            taken = range(x.shape[axis])[slice(start, None if end < -x.shape[axis] else end, step)]
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.int64))
        else:
            index = [slice(None)] * x.dim()
            index[axis] = slice(start, min(end, x.shape[axis]), step)
            x = x[tuple(index)]
    return x


def pad(
    x: Tensor,
    pads: Numbers,
    value: Floats | float | None = None,
    axes: Numbers | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Pad with a constant, the edge or a reflection; negative pads cut."""
    rank, count = x.dim(), len(pads) // 2
    by_axis = dict.fromkeys(range(rank), (0, 0))
    for i in range(count):
        by_axis[(axes[i] if axes else i) % rank] = (pads[i], pads[count + i])
    modes = {"constant": "constant", "edge": "replicate", "reflect": "reflect"}
    if mode not in modes:
        refuse("mode", mode, ", ".join(modes))
    last = max((axis for axis, both in by_axis.items() if any(both)), default=None)
    if last is None:
        return x
    first = min(axis for axis, both in by_axis.items() if any(both))
    amounts = [pad for axis in reversed(range(first, rank)) for pad in by_axis[axis]]
    if mode == "constant":
        return F.pad(x, amounts, value=float(value if isinstance(value, (int, float)) else (value or [0])[0]))
    return F.pad(x, amounts, mode=modes[mode])


def expand(x: Tensor, shape: Numbers) -> Tensor:
    """Expand by broadcasting in both directions."""
    return x.expand(*torch.broadcast_shapes(x.shape, tuple(shape)))  # type: ignore[no-untyped-call]


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DepthToSpace."""
    b, C, H, W = x.shape
    r = blocksize
    if mode == "CRD":
        return F.pixel_shuffle(x, r)
    return x.reshape(b, r, r, C // r**2, H, W).permute(0, 3, 4, 1, 5, 2).reshape(b, C // r**2, H * r, W * r)


def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    """SpaceToDepth."""
    b, C, H, W = x.shape
    r = blocksize
    return x.reshape(b, C, H // r, r, W // r, r).permute(0, 3, 5, 1, 2, 4).reshape(b, C * r**2, H // r, W // r)

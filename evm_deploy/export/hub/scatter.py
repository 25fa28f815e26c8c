"""Writes into a part of a tensor, as concatenations: not every runtime has ScatterND and ScatterElements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def scatter_translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return translations for torch.onnx.export of `y[:, 0] = x`, `y[:, 1:3] = x` and `y[:, ::2] = x`.

    before:  ScatterND(%y, .., %x), ScatterElements(%y, .., %x)
    after:   Concat(Slice(%y, before the part), %x, Slice(%y, after the part)), or for steps
             Gather(Concat(%y, %x), places)
    """
    import torch
    from onnxscript import values

    op = values.Opset("", opset)

    def constant(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    def write(y: Any, x: Any, dim: int, start: int, end: int) -> Any:
        size, axis = y.shape[dim], dim % len(y.shape)
        parts = [op.Slice(y, constant(0), constant(start), constant(axis))] if start else []
        parts.append(x)
        if end < size:
            parts.append(op.Slice(y, constant(end), constant(size), constant(axis)))
        return op.Concat(*parts, axis=axis) if len(parts) > 1 else op.Identity(x)

    def select_scatter(y: Any, x: Any, dim: int, index: int) -> Any:
        start = index % y.shape[dim]
        return write(y, op.Unsqueeze(x, constant(dim % len(y.shape))), dim, start, start + 1)

    def slice_scatter(
        y: Any, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> Any:
        first, last, _ = slice(start, end).indices(y.shape[dim])
        if step == 1:
            return write(y, x, dim, first, max(first, last))
        places = list(range(y.shape[dim]))
        for number, place in enumerate(range(first, last, step)):
            places[place] = y.shape[dim] + number
        axis = dim % len(y.shape)
        return op.Gather(op.Concat(y, x, axis=axis), constant(*places), axis=axis)

    return {
        torch.ops.aten.select_scatter.default: select_scatter,
        torch.ops.aten.slice_scatter.default: slice_scatter,
    }

"""Writes into a part of a tensor, as concatenations: not every runtime has ScatterND and ScatterElements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def scatter_translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return translations for torch.onnx.export of `y[:, 0] = x` and `y[:, 1:3] = x`.

    before:  ScatterND(%y, .., %x), ScatterElements(%y, .., %x)
    after:   Concat(Slice(%y, before the part), %x, Slice(%y, after the part))
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
        return write(y, x, dim, first, max(first, last))

    return {
        torch.ops.aten.select_scatter.default: select_scatter,
        torch.ops.aten.slice_scatter.default: slice_scatter,
    }

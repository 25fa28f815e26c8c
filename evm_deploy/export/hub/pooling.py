"""Adaptive average pooling as pooling, or as products with constant matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evm_deploy.model.resampling import window_means


def pooling_translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return translations for torch.onnx.export of adaptive average pooling from (H, W) to (h, w).

    before:  Gather for each element of a window, Add, Div
    after:   ReduceMean(%x, (2, 3))        for h = w = 1
             AveragePool(%x)               if h divides H and w divides W
             MatMul(rows, MatMul(%x, columns))        else, without a product for an axis that keeps its size

    The matrices hold the windows' weights, so that results differ by rounding only. H and W must be known.
    """
    import torch
    from onnxscript import ir, values

    op = values.Opset("", opset)

    def adaptive_avg_pool2d(x: Any, output_size: Sequence[int]) -> Any:
        sizes, wanted = tuple(x.shape[-2:]), tuple(output_size)
        if wanted == sizes:
            return op.Identity(x)
        if wanted == (1, 1):
            return op.ReduceMean(x, op.Constant(value_ints=[-2, -1]), keepdims=1)
        if len(x.shape) == 4 and not any(size % want for size, want in zip(sizes, wanted, strict=True)):
            window = [size // want for size, want in zip(sizes, wanted, strict=True)]
            return op.AveragePool(x, kernel_shape=window, strides=window)
        (height, width), (rows, columns) = sizes, wanted
        if width != columns:
            x = op.MatMul(x, op.Constant(value=ir.tensor(np.ascontiguousarray(window_means(width, columns).T))))
        if height != rows:
            x = op.MatMul(op.Constant(value=ir.tensor(window_means(height, rows))), x)
        return x

    return {
        torch.ops.aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        torch.ops.aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    }

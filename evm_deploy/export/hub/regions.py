"""RoIAlign of a detector's second stage in the hub graph: ONNX's operator, on the regions of all images at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def region_translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return the translation of evm::roi_align for torch.onnx.export.

    before:  evm::roi_align(maps (b, C, h, w), boxes (b, n, 4), size) -> (b * n, C, size, size)
    after:   RoiAlign(maps, boxes (b * n, 4), the image of each box), of opset 16: half_pixel, as many samples as fit
    """
    import torch
    from onnxscript import values

    import evm_deploy.model.regions  # noqa: F401  registers evm::roi_align

    op = values.Opset("", opset)

    def ints(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    def roi_align(maps: Any, boxes: Any, size: int) -> Any:
        shape = op.Shape(boxes, start=0, end=2)
        images = op.Squeeze(op.Shape(boxes, start=0, end=1), ints(0))
        numbers = op.Range(op.Constant(value_int=0), images, op.Constant(value_int=1))
        image = op.Reshape(op.Expand(op.Unsqueeze(numbers, ints(1)), shape), ints(-1))
        return op.RoiAlign(
            maps,
            op.Reshape(boxes, ints(-1, 4)),
            image,
            mode="avg",
            coordinate_transformation_mode="half_pixel",
            output_height=size,
            output_width=size,
            sampling_ratio=0,
            spatial_scale=1.0,
        )

    return {torch.ops.evm.roi_align.default: roi_align}

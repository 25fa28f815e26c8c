"""Non-maximum suppression of a detector in the hub graph: ONNX's operator, with one row of results for each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from evm_deploy.export.hub.naming import below
from evm_deploy.tasks.task import SELECTION

if TYPE_CHECKING:
    import onnx


def nms_translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """Return the translation of evm::nms for torch.onnx.export.

    before:  evm::nms(boxes (b, n, 4), scores (b, n), iou, most) -> (b, most)
    after:   NonMaxSuppression -> rows (image, class, box) of all images, (m, 3); m depends on the data
             each row's place among those of its image, by a running sum; ScatterElements into (b, most) of -1

    Boxes of different classes are apart already, so there is one class. Scores of 0 or less take no part: the threshold
    of OpenVINO includes 0, that of ONNX Runtime does not, and there are no scores of 0.
    """
    import torch
    from onnxscript import values

    import evm_deploy.model.detection  # noqa: F401  registers evm::nms

    op = values.Opset("", opset)

    def ints(*numbers: int) -> Any:
        return op.Constant(value_ints=list(numbers))

    def floats(number: float) -> Any:
        return op.Constant(value_floats=[number])

    def nms(boxes: Any, scores: Any, iou: float, most: int) -> Any:
        rows = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, ints(1)), ints(most), floats(iou), floats(0.0))
        image, box = (op.Gather(rows, op.Constant(value_int=column), axis=1) for column in (0, 2))
        images = op.Shape(scores, start=0, end=1)
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        numbers = op.Range(zero, op.Squeeze(images), one)
        own = op.Cast(op.Equal(op.Unsqueeze(image, ints(1)), op.Unsqueeze(numbers, ints(0))), to=7)  # (m, b) int64
        place = op.ReduceSum(op.Mul(op.CumSum(own, zero, exclusive=1), own), ints(1), keepdims=0)
        total = op.Mul(images, ints(most))
        nothing = op.Expand(ints(-1), total)
        flat = op.ScatterElements(nothing, op.Add(op.Mul(image, op.Constant(value_int=most)), place), box, axis=0)
        return op.Reshape(flat, op.Concat(images, ints(most), axis=0))

    return {torch.ops.evm.nms.default: nms}


def selection_nodes(model: onnx.ModelProto) -> Iterable[str]:
    """Yield the names of the nodes that select detections. They compute in float32 in every precision."""
    return (node.name for node in model.graph.node if below(SELECTION, node.name))

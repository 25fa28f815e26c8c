"""Selection of detections in a Core ML program: non-maximum suppression, and float32 for all that selects."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from evm_deploy.export.coreml.coremltools_patch import converter
from evm_deploy.tasks.task import SELECTION

OP = "evm::nms"
INTEGERS = ("labels", "count", "label_map")  # outputs that are int32


def half_precision() -> Any:
    """Return the precision of a float16 program: every operation in float16 but those of the selection."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    ct = converter()

    def in_half(op: Any) -> bool:
        modules = op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME, ())
        return not any(SELECTION in str(name).split(".") for name in modules)

    return ct.transform.FP16ComputePrecision(op_selector=in_half)


@cache
def register_suppression() -> None:
    """Make coremltools convert evm::nms in this process, to `non_maximum_suppression` of MIL.

    before:  evm::nms(boxes (b, n, 4) corners, scores (b, n), iou, most) -> (b, most), -1 in rows without a box
    after:   centres and sizes; non_maximum_suppression; -1 in rows whose score is 0 or less, or that repeat a row

    The operation of iOS17 has no score threshold and no count, and nothing says what it pads with: so a row counts if
    its score is positive and no row before it has the same index.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil import register_torch_op
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.mil import types

    of_floats = ops.floor_divide

    @register_torch_op(torch_alias=[OP], override=True)  # type: ignore[untyped-decorator]
    def nms(context: Any, node: Any) -> None:
        boxes, scores, iou, most = _get_inputs(context, node, expected=4)
        context.add(suppression(mb, boxes, scores, float(iou.val), int(most.val)), torch_name=node.name)

    @register_torch_op(override=True)  # type: ignore[untyped-decorator]
    def floor_divide(context: Any, node: Any) -> None:
        """Convert a division of whole numbers to whole numbers: coremltools 9.0 makes them float32, unlike torch."""
        x, y = _get_inputs(context, node, expected=2)
        if types.is_int(x.dtype) and types.is_int(y.dtype):
            context.add(mb.floor_div(x=x, y=y, name=node.name))
        else:
            of_floats(context, node)


def suppression(mb: Any, boxes: Any, scores: Any, iou: float, most: int) -> Any:
    """Append the operations of `evm::nms` to the MIL program. Returns the indices (b, most) int32."""
    from coremltools.converters.mil._deployment_compatibility import AvailableTarget
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with as at_least

    batch = boxes.shape[0]
    low, high = mb.split(x=boxes, num_splits=2, axis=2)
    coded = mb.concat(values=[mb.mul(x=mb.add(x=low, y=high), y=np.float32(0.5)), mb.sub(x=high, y=low)], axis=2)
    rows = mb.expand_dims(x=scores, axes=[2])
    limits = {"iou_threshold": np.float32(iou), "max_boxes": most}
    if at_least(AvailableTarget.iOS17):
        coded, rows = (mb.transpose(x=each, perm=[0, 2, 1]) for each in (coded, rows))
        _, found, index = mb.non_maximum_suppression(boxes=coded, scores=rows, **limits)
    else:
        limits["score_threshold"] = np.float32(0)
        _, found, index, _ = mb.non_maximum_suppression(boxes=coded, scores=rows, **limits)
    found = mb.reshape(x=found, shape=(batch, most))
    before = np.tril(np.ones((most, most), bool), -1)[None]
    same = mb.equal(x=mb.expand_dims(x=index, axes=[2]), y=mb.expand_dims(x=index, axes=[1]))
    repeats = mb.reduce_max(x=mb.cast(x=mb.logical_and(x=same, y=before), dtype="int32"), axes=[2], keep_dims=False)
    real = mb.logical_and(x=mb.greater(x=found, y=np.float32(0)), y=mb.equal(x=repeats, y=0))
    return mb.select(cond=real, a=index, b=np.int32(-1))

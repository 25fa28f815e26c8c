"""Non-maximum suppression of detectors in TensorRT: limits of its layers, and the plugin EfficientNMS_TRT.

TensorRT makes an INMSLayer of ONNX's NonMaxSuppression: at most 5000 candidates of an image, and a slow one from 10.0
to 10.6 (NVIDIA/TensorRT#4248). The plugin takes the best 4096 candidates. Neither was run here: there was no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy.errors import UsageError
from evm_deploy.tasks.detection import BOXES, COUNT, LABELS, SCORES
from evm_deploy.tasks.task import SELECTION

if TYPE_CHECKING:
    import onnx

DOMAIN, PLUGIN = "TRT", "EfficientNMS_TRT"
MAX_CANDIDATES = 5000  # of INMSLayer, for each image; 2000 on the GPUs of Jetson TX1 and TX2 (sm_53, sm_62)
MAX_TOP_K = 3840  # K of ITopKLayer

# NonMaxSuppression in the form of the plugin: the first `num` rows of an image hold a box, the others anything
FUNCTION = """
<domain: "TRT", opset_import: ["" : 18]>
EfficientNMS_TRT <score_threshold, iou_threshold, max_output_boxes, background_class, score_activation, box_coding,
    plugin_version, plugin_namespace> (boxes, scores) => (num, found, best, classes)
{
    iou = Constant <value_float: float = @iou_threshold> ()
    least = Constant <value_float: float = @score_threshold> ()
    most = Constant <value_int: int = @max_output_boxes> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    two = Constant <value_int: int = 2> ()
    axis0 = Constant <value_ints: ints = [0]> ()
    axis1 = Constant <value_ints: ints = [1]> ()
    axis2 = Constant <value_ints: ints = [2]> ()
    none = Constant <value_ints: ints = [-1]> ()
    by_class = Transpose <perm: ints = [0, 2, 1]> (scores)
    rows = NonMaxSuppression (boxes, by_class, most, iou, least)
    image = Gather <axis: int = 1> (rows, zero)
    box = Gather <axis: int = 1> (rows, two)
    images = Shape <start: int = 0, end: int = 1> (boxes)
    count = Squeeze (images)
    numbers = Range (zero, count, one)
    image_column = Unsqueeze (image, axis1)
    number_row = Unsqueeze (numbers, axis0)
    is_own = Equal (image_column, number_row)
    own = Cast <to: int = 7> (is_own)
    before = CumSum <exclusive: int = 1> (own, zero)
    at = Mul (before, own)
    place = ReduceSum <keepdims: int = 0> (at, axis1)
    most_row = Unsqueeze (most, axis0)
    total = Mul (images, most_row)
    nothing = Expand (none, total)
    first = Mul (image, most)
    where = Add (first, place)
    flat = ScatterElements <axis: int = 0> (nothing, where, box)
    shape = Concat <axis: int = 0> (images, most_row)
    index = Reshape (flat, shape)
    real = GreaterOrEqual (index, zero)
    safe = Where (real, index, zero)
    places = Unsqueeze (safe, axis2)
    found = GatherND <batch_dims: int = 1> (boxes, places)
    column = Squeeze (scores, axis2)
    best = GatherND <batch_dims: int = 1> (column, places)
    ones = Cast <to: int = 6> (real)
    num = ReduceSum <keepdims: int = 1> (ones, axis1)
    classes = Sub (ones, ones)
}
"""


def check_limits(model: onnx.ModelProto) -> None:
    """Raise UsageError for a selection that TensorRT's layers do not take: too many candidates, or a K too large."""
    from onnx import numpy_helper, shape_inference

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*inferred.value_info, *inferred.input)}
    for node in model.graph.node:
        if node.op_type == "TopK" and node.input[1] in constants:
            k = int(numpy_helper.to_array(constants[node.input[1]]).ravel()[0])
            if k > MAX_TOP_K:
                raise UsageError(
                    f"the selection takes the best {k} of a level, TensorRT's TopK at most {MAX_TOP_K}",
                    f"train or save the detector with an nms_pre of at most {MAX_TOP_K}",
                )
        elif node.op_type == "NonMaxSuppression" and len(shapes.get(node.input[0], ())) == 3:
            candidates = shapes[node.input[0]][1].dim_value
            if candidates > MAX_CANDIDATES:
                raise UsageError(
                    f"{candidates} candidates of an image reach the NMS, TensorRT's INMSLayer takes {MAX_CANDIDATES}",
                    "use --nms none, or --efficient-nms, which takes the best 4096",
                )


def use_plugin(model: onnx.ModelProto, size: tuple[int, int]) -> int:
    """Replace a detector's NonMaxSuppression by EfficientNMS_TRT, in place. Returns how many: 1, or 0 without one.

    before:  boxes shifted by class (b, n, 4), scores (b, 1, n) -> NonMaxSuppression -> rows -> gathers -> the outputs
    after:   boxes shifted by class, scores (b, n, 1) -> EfficientNMS_TRT -> count, boxes still shifted, scores
             label = floor(x1 / (side + 1)); boxes minus the shift; rows from count on 0, with label -1

    size: (H, W) of the input in pixels; `side` is the larger one. A shift of many classes rounds boxes in float32: to
    1/256 pixel at 80 classes and 1344 pixels. The names of the outputs stay.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
    if not nodes:
        return 0
    (old,) = nodes
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    most, iou, least = (constants[name].ravel()[0] for name in old.input[2:5])
    added: list[onnx.NodeProto] = []

    def constant(name: str, value: Any) -> str:
        model.graph.initializer.append(numpy_helper.from_array(value, f"{SELECTION}/{PLUGIN}/{name}"))
        return f"{SELECTION}/{PLUGIN}/{name}"

    def op(kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        name = f"{SELECTION}/{PLUGIN}/{kind}_{len(added)}"
        added.append(helper.make_node(kind, inputs, [output or name], name, **attributes))
        return output or name

    first, second, third = (constant(f"axis{axis}", np.array([axis])) for axis in range(3))
    step = constant("step", np.float32(max(size) + 1))
    zero, nothing = constant("zero", np.float32(0)), constant("nothing", np.float32(-1))
    by_box = op("Transpose", [old.input[1]], perm=[0, 2, 1])
    outputs = [f"{SELECTION}/{PLUGIN}/{name}" for name in ("num", "shifted", "best", "classes")]
    added.append(
        helper.make_node(
            PLUGIN,
            [old.input[0], by_box],
            outputs,
            f"{SELECTION}/{PLUGIN}",
            domain=DOMAIN,
            plugin_version="1",
            plugin_namespace="",
            background_class=-1,
            score_activation=0,
            box_coding=0,
            max_output_boxes=int(most),
            iou_threshold=float(iou),
            score_threshold=float(least),
        )
    )
    num, shifted, best, _ = outputs
    rows = op("Unsqueeze", [constant("rows", np.arange(int(most), dtype=np.int32)), first])
    real = op("Less", [rows, num])
    x1 = op("Squeeze", [op("Slice", [shifted, first, second, third]), third])
    label = op("Floor", [op("Div", [x1, step])])
    boxes = op("Sub", [shifted, op("Unsqueeze", [op("Mul", [label, step]), third])])
    op("Where", [op("Unsqueeze", [real, third]), boxes, zero], BOXES)
    op("Where", [real, best, zero], SCORES)
    op("Cast", [op("Where", [real, label, nothing])], LABELS, to=TensorProto.INT32)
    op("Squeeze", [num, second], COUNT)
    kept = [node for node in model.graph.node if not set(node.output) & {BOXES, SCORES, LABELS, COUNT}]
    _keep(model, [*kept, *added])
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return 1


def _keep(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Keep those of these nodes that the outputs need, and the constants and shapes of these."""
    needed = {value.name for value in model.graph.output}
    found = []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
            found.append(node)
    made = {name for node in found for name in node.output}
    for field, names in ((model.graph.initializer, needed), (model.graph.value_info, made)):
        kept = [each for each in field if each.name in names]
        del field[:]
        field.extend(kept)
    del model.graph.node[:]
    model.graph.node.extend(reversed(found))


def emulate(model: onnx.ModelProto) -> bool:
    """Give a graph with the plugin a function that computes it in ONNX Runtime, in place. Returns whether it has one.

    The function suppresses as ONNX defines it. It takes any number of candidates.
    """
    from onnx import parser

    if not any((node.domain, node.op_type) == (DOMAIN, PLUGIN) for node in model.graph.node):
        return False
    model.functions.append(parser.parse_function(FUNCTION))
    return True

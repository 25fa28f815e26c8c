"""Conversion of ONNX models to float16, for several targets."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from evm_deploy._util.onnx import in_order
from evm_deploy.export.hub import float16
from evm_deploy.export.hub.suppression import selection_nodes
from evm_deploy.scan.onnx_function import OP_TYPE

if TYPE_CHECKING:
    import onnx

    from evm_deploy.export.hub.graph import ScanSite


def check_fp16_range(model: onnx.ModelProto, sites: Iterable[ScanSite]) -> None:
    """Raise UsageError naming a weight that float16 cannot hold. Scans stay float32: their constants may be larger."""
    from onnx import TensorProto, numpy_helper

    scan_constants = {name for site in sites for name in site.reads.values()}
    float16.check_range(
        (tensor.name, numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scan_constants
    )


def to_fp16(model: onnx.ModelProto, sites: Iterable[ScanSite]) -> onnx.ModelProto:
    """Convert weights and activations to float16. Inputs and outputs keep their types; scans stay float32 with casts.

    Changes `model`; use the result. Raises UsageError naming a weight that float16 cannot hold.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    check_fp16_range(model, sites)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.value_info if value.name in constants]:
        model.graph.value_info.remove(value)  # otherwise the converter puts casts between a scan and its constants
    functions, selected = list(model.functions), set(selection_nodes(model))
    half: onnx.ModelProto = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        min_positive_val=5.97e-8,  # smallest float16; the converter's default would change small weights more
        op_block_list=[OP_TYPE, "Resize"],
        node_block_list=list(selected),
    )
    if not half.functions:
        half.functions.extend(functions)
    join_float32(half, selected)
    return in_order(half)


def join_float32(model: onnx.ModelProto, kept: Collection[str]) -> int:
    """Remove the way over float16 between nodes that stay float32: the converter puts one behind each of them.

    before:  %1 = TopK(..);  %2 = Cast(%1, float16);  %3 = Cast(%2, float32);  Sigmoid(%3)
    after:   %1 = TopK(..);  Sigmoid(%1)                        %3 may also be an output of the graph

    kept: names of the nodes that stay float32. Returns the number of ways removed.
    """
    from onnx import TensorProto

    def to(node: onnx.NodeProto) -> int:
        return next((each.i for each in node.attribute if each.name == "to"), 0) if node.op_type == "Cast" else 0

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    renames: dict[str, str] = {}
    dead: list[onnx.NodeProto] = []
    for node in graph.node:
        down = makers.get(node.input[0]) if to(node) == TensorProto.FLOAT else None
        source = makers.get(down.input[0]) if down is not None and to(down) == TensorProto.FLOAT16 else None
        if down is not None and source is not None and source.name in kept:
            if node.output[0] in outputs:
                renames[down.input[0]] = node.output[0]
            else:
                renames[node.output[0]] = down.input[0]
            dead.append(node)
    final = {old: renames.get(new, new) for old, new in renames.items()}
    for node in dead:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [final.get(name, name) for name in node.input]
        node.output[:] = [final.get(name, name) for name in node.output]
    read = {name for node in graph.node for name in node.input} | outputs
    for node in [node for node in graph.node if to(node) == TensorProto.FLOAT16 and node.output[0] not in read]:
        graph.node.remove(node)
    return len(dead)

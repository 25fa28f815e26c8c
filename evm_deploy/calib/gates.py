"""Squeeze-excite gates between int8 layers: rounding that lets runtimes compute them in integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.onnx import add_constant, constant_of

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

STEP = np.float32(1 / 255)  # scale of a sigmoid as uint8 with zero point 0


class Gate(NamedTuple):
    """Nodes of a gate: value * sigmoid(layers(mean(value)))."""

    value: ir.Node
    mean: ir.Node
    sigmoid: ir.Node


def with_rounded_gates(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in which every squeeze-excite gate (arXiv 1709.01507) between int8 layers has rounded tensors.

    before:  %1 = DequantizeLinear(%q, s, 0);  %x = Relu(%1);  %m = ReduceMean(%x, (-2, -1));  QuantizeLinear(%m, ..)
             %g = Sigmoid(DequantizeLinear(..));  %y = Mul(%x, %g);  QuantizeLinear(%y, ..)
    after:   %x = DequantizeLinear(%q, s, 0);  %m = GlobalAveragePool(%x);  QuantizeLinear(%m, ..)
             %h = DequantizeLinear(QuantizeLinear(%g, 1/255, 0), 1/255, 0);  %y = Mul(%x, %h);  QuantizeLinear(%y, ..)

    The activations of `model` have Q/DQ pairs of uint8. ONNX Runtime fuses each operator with the pairs around it. Of
    values with zero point 0 none is below 0, so that ReLU changes none. A gate may also be without ReLU. The gate
    %g gets an error of at most half of 1/255.
    """
    import onnx_ir

    result = onnx_ir.from_proto(model)
    gates = [gate for node in result.graph if node.op_type == "Mul" and (gate := _gate(node))]
    for value, mean, sigmoid in gates:
        if value.op_type == "Relu":
            value.outputs[0].replace_all_uses_with(value.inputs[0])
            result.graph.remove(value, safe=True)
        _add_pair(
            sigmoid, _constant(result.graph, "gate_scale", STEP), _constant(result.graph, "gate_zero", np.uint8(0))
        )
        _pool(mean)
    proto: onnx.ModelProto = onnx_ir.to_proto(result)
    return proto if gates else model


def _gate(product: ir.Node) -> Gate | None:
    """Return the gate that ends in `product`, or None."""
    factors = [value.producer() for value in product.inputs if value]
    if len(factors) < 2 or not _only(product, "QuantizeLinear"):
        return None
    for value, sigmoid in (factors, factors[::-1]):
        if value is None or sigmoid is None or sigmoid.op_type != "Sigmoid" or _scale(_source(sigmoid)) is None:
            continue
        rounded = _scale(value) is not None or (value.op_type == "Relu" and _is_zero(_source(value)))
        means = [node for node in value.outputs[0].consumers() if node.op_type == "ReduceMean" and _is_spatial(node)]
        if rounded and len(means) == 1 and _only(sigmoid, "Mul") and not value.outputs[0].is_graph_output():
            return Gate(value, means[0], sigmoid)
    return None


def _source(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs[0] else None


def _scale(node: ir.Node | None) -> NDArray[Any] | None:
    """Return the scale of a DequantizeLinear with one scale for the whole tensor; None for other nodes."""
    if node is None or node.op_type != "DequantizeLinear":
        return None
    scale = constant_of(node.inputs[1])
    return scale if scale is not None and scale.ndim == 0 else None


def _is_zero(node: ir.Node | None) -> bool:
    """Test whether a node is a DequantizeLinear of uint8 with one scale and zero point 0."""
    if node is None or _scale(node) is None:
        return False
    zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return zero_point is not None and zero_point.dtype == np.uint8 and zero_point == 0


def _only(node: ir.Node, reader: str) -> bool:
    """Test whether one node reads the node's output, and is of type `reader`."""
    readers = [each.op_type for each in node.outputs[0].consumers()]
    return readers == [reader] and not node.outputs[0].is_graph_output()


def _is_spatial(mean: ir.Node) -> bool:
    """Test whether a ReduceMean is GlobalAveragePool of an image, followed by QuantizeLinear."""
    axes = constant_of(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes is None or not mean.attributes.get_int("keepdims", 1) or not _only(mean, "QuantizeLinear"):
        return False
    shape = mean.outputs[0].shape  # known from the float graph; has as many axes as the input
    return sorted(axes.tolist()) in ([-2, -1], [2, 3]) and shape is not None and len(shape) == 4


def _add_pair(node: ir.Node, scale: ir.Value, zero_point: ir.Value) -> None:
    """Let all readers of a node read its output rounded."""
    import onnx_ir as ir

    exact = node.outputs[0]
    quantized, rounded = ir.Value(name=f"{exact.name}_quantized"), ir.Value(name=f"{exact.name}_rounded")
    exact.replace_all_uses_with(rounded)
    pair = [
        ir.Node("", "QuantizeLinear", [exact, scale, zero_point], outputs=[quantized], name=""),
        ir.Node("", "DequantizeLinear", [quantized, scale, zero_point], outputs=[rounded], name=""),
    ]
    node.append(pair)


def _pool(mean: ir.Node) -> None:
    import onnx_ir as ir

    pooled = ir.Value(name=mean.outputs[0].name)
    mean.append(ir.Node("", "GlobalAveragePool", mean.inputs[:1], outputs=[pooled], name=mean.name))
    mean.outputs[0].replace_all_uses_with(pooled)
    mean.graph.remove(mean, safe=True)


def _constant(graph: ir.Graph, name: str, value: np.generic) -> ir.Value:
    """Return the constant `name` of a graph, registered by the first call."""
    return graph.initializers.get(name) or add_constant(graph, name, np.asarray(value))

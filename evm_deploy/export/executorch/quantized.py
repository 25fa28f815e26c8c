"""Passes on the graph of an int8 program, for the forms of Q/DQ nodes that XNNPACK takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evm_deploy.calib.layers import LAYERS
from evm_deploy.scan.onnx_function import DOMAIN

if TYPE_CHECKING:
    import onnx

LINEAR = "Linear"  # operator of domain evm inside this package: x W^T, as torch's linear
ACTIVATIONS = ("QuantizeLinear", "DequantizeLinear")


def prepare(model: onnx.ModelProto) -> None:
    """Give the Q/DQ nodes of a graph the forms that XNNPACK takes, in place. The graph computes the same numbers."""
    float_biases(model)
    float_weights(model)
    transpose_matrices(model)
    sign_activations(model)
    widen_zero_points(model)
    repeat_dequantization(model)


def float_weights(model: onnx.ModelProto) -> int:
    """Store the weights of layers as float32 whose input or output is not rounded. Returns how many.

    XNNPACK takes layers whose input, weight and output are all int8. Others compute in float32, with these weights.

    before:  %w = DequantizeLinear(W int8, scale);  %y = MatMul(%x, %w);  Add(%y, ..)
    after:   %y = MatMul(%x, W * scale);  Add(%y, ..)
    """
    from onnx import numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def rounded(name: str) -> bool:
        after = readers.get(name, [])
        if len(after) == 1 and after[0].op_type == "Relu":
            after = readers.get(after[0].output[0], [])
        return bool(after) and all(node.op_type == "QuantizeLinear" for node in after)

    done = []
    for node in graph.node:
        if node.op_type not in LAYERS:
            continue
        maker, before = makers.get(node.input[1]), makers.get(node.input[0])
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in tensors:
            continue
        if before is not None and before.op_type == "DequantizeLinear" and rounded(node.output[0]):
            continue
        value, scale = (numpy_helper.to_array(tensors[name]) for name in maker.input[:2])
        axis = next((attribute.i for attribute in maker.attribute if attribute.name == "axis"), 1)
        shape = [-1 if i == axis else 1 for i in range(value.ndim)] if scale.ndim else []
        name = f"{maker.output[0]}/float"
        if name not in tensors:
            tensors[name] = graph.initializer.add()
            tensors[name].CopyFrom(numpy_helper.from_array((value * scale.reshape(shape)).astype(np.float32), name))
        node.input[1] = name
        done.append(maker.output[0])
    read = {name for node in graph.node for name in node.input}
    for node in [makers[name] for name in dict.fromkeys(done) if name not in read]:
        graph.node.remove(node)
    return len(done)


def widen_zero_points(model: onnx.ModelProto) -> int:
    """Give int8 weights zero points of type int64, as XNNPACK reads them, in place. Returns how many.

    before:  DequantizeLinear(W, scale)
    after:   DequantizeLinear(W, scale, zeros int64)
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        given = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        scale, name = numpy_helper.to_array(tensors[node.input[1]]), f"{node.output[0]}/zero_points"
        value = np.broadcast_to(given, scale.shape).astype(np.int64)
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        node.input[2:] = [name]
        count += 1
    return count


def sign_activations(model: onnx.ModelProto) -> int:
    """Store rounded activations as int8 in place of uint8. Returns how many Q/DQ nodes changed.

    before:  QuantizeLinear(%x, scale, 131 uint8)
    after:   QuantizeLinear(%x, scale, 3 int8)                the values are 128 less, and mean the same
    """
    from onnx import TensorProto, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    count = 0
    for node in model.graph.node:
        zero = tensors.get(node.input[2]) if node.op_type in ACTIVATIONS and len(node.input) > 2 else None
        if zero is None or zero.data_type != TensorProto.UINT8:
            continue
        name = f"{zero.name}/signed"
        if name not in tensors:
            value = numpy_helper.to_array(zero).astype(np.int16) - 128
            tensors[name] = model.graph.initializer.add()
            tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.int8), name))
        node.input[2] = name
        count += 1
    return count


def float_biases(model: onnx.ModelProto) -> int:
    """Store int32 biases as float32: XNNPACK rounds them itself. Returns how many.

    before:  %b = DequantizeLinear(B int32, scale);  Conv(%x, %w, %b)
    after:   Conv(%x, %w, B * scale)
    """
    from onnx import TensorProto, numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    done = []
    for node in graph.node:
        bias = tensors.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if bias is None or bias.data_type != TensorProto.INT32:
            continue
        value = numpy_helper.to_array(bias) * numpy_helper.to_array(tensors[node.input[1]])
        graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), node.output[0]))
        done.append(node)
    for node in done:
        graph.node.remove(node)
    return len(done)


def transpose_matrices(model: onnx.ModelProto) -> int:
    """Replace products with int8 matrices (in, out) by evm::Linear with (out, in), in place. Returns how many.

    before:  %w = DequantizeLinear(W, scale, axis=1);  %y = MatMul(%x, %w)
    after:   %w = DequantizeLinear(W^T, scale, axis=0);  %y = evm::Linear(%x, %w)
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    done = set()
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        if maker is None or maker.input[0] not in tensors:
            continue
        if maker.output[0] not in done:
            name = f"{maker.input[0]}/transposed"
            value = np.ascontiguousarray(numpy_helper.to_array(tensors[maker.input[0]]).T)
            model.graph.initializer.append(numpy_helper.from_array(value, name))
            maker.input[0] = name
            for attribute in maker.attribute:
                if attribute.name == "axis":
                    attribute.i = 1 - attribute.i % 2
            done.add(maker.output[0])
        node.op_type, node.domain = LINEAR, DOMAIN
    return len(done)


def repeat_dequantization(model: onnx.ModelProto) -> int:
    """Give each reader of a rounded activation its own DequantizeLinear, in place. Returns how many were added.

    before:  %1 = DequantizeLinear(%q);  Conv(%1);  Add(%1, ..)
    after:   %1 = DequantizeLinear(%q);  Conv(%1);  %2 = DequantizeLinear(%q);  Add(%2, ..)

    ExecuTorch takes a DequantizeLinear into the part of its reader: one with readers in two parts makes a cycle.
    """
    import onnx

    makers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    read = set()
    nodes: list[onnx.NodeProto] = []
    added = 0
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in makers and name in read:
                copy = onnx.NodeProto()
                copy.CopyFrom(makers[name])
                added += 1
                copy.name, copy.output[0] = f"{makers[name].name}/again_{added}", f"{name}/again_{added}"
                node.input[i] = copy.output[0]
                nodes.append(copy)
            read.add(name)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return added

"""int8 layers in an ONNX graph: explicit Q/DQ pairs with our ranges, or int8 weights alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from evm_deploy._util.onnx import in_order
from evm_deploy.calib.gates import with_rounded_gates
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.layers import LAYERS, Layer, activations

if TYPE_CHECKING:
    import onnx

SMALLEST_SCALE = 1e-12
LARGEST_WEIGHT = {8: 127, 7: 64}  # by weight_bits
QUANTIZED = "_quantized"  # end of an int8 weight's name, after the name of the float weight


def insert_qdq(
    model: onnx.ModelProto,
    found: Collection[Layer],
    ranges: Mapping[str, Range],
    *,
    symmetric: bool = False,
    rounded_outputs: bool = False,
    weight_bits: int = 8,
) -> onnx.ModelProto:
    """Return a copy of `model` with the layers `found` between Q/DQ pairs, weight_only layers with int8 weights alone.

    Weights: int8, symmetric, one scale per output channel. Activations: one scale per tensor over `ranges`, which are
    keyed as in `activations`: uint8 with a zero point for ONNX Runtime, or with `symmetric` int8 with zero point 0 for
    TensorRT. With a zero point squeeze-excite gates are rounded, too (`with_rounded_gates`). rounded_outputs:
    round the output of every layer, also where `float_output` is set. weight_bits: 7 for weights in -64..64, which
    cannot saturate (`saturating_weights`); weight_only layers keep 8.
    """
    stacked = [layer for layer in found if layer.stacked]
    pairs = [layer for layer in found if not (layer.weight_only or layer.stacked)]
    if rounded_outputs:
        pairs = [replace(layer, float_output=False) for layer in pairs]
    result = _insert_pairs(model, pairs, ranges, symmetric, weight_bits) if pairs else copy.deepcopy(model)
    if not symmetric:
        result = with_rounded_gates(result)
    _store_weights(result, {layer.weight for layer in found if layer.weight_only}, dequantize=symmetric)
    _store_weights(result, {layer.weight for layer in stacked}, dequantize=False, largest=LARGEST_WEIGHT[weight_bits])
    _round_inputs(result, stacked, ranges)
    _name_after_readers(result)
    return result


def _insert_pairs(
    model: onnx.ModelProto,
    found: Collection[Layer],
    ranges: Mapping[str, Range],
    symmetric: bool,
    weight_bits: int,
) -> onnx.ModelProto:
    """Return a copy of `model` with Q/DQ pairs around the layers `found`, which must not be empty."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    relus = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Relu"}
    data = {}
    for tensor, key in activations(found).items():
        covered = ranges[key]
        value = TensorData(lowest=np.float32(covered.low), highest=np.float32(covered.high))
        data[tensor] = value
        if tensor in relus:
            data[relus[tensor]] = value
    quantizer = QDQQuantizer(
        copy.deepcopy(model),
        per_channel=True,
        reduce_range=weight_bits == 7,  # of the weights alone, which are then in -64..64
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[layer.node for layer in found],  # an empty list would mean all
        nodes_to_exclude=[],
        op_types_to_quantize=list(LAYERS),
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "QuantizeBias": not symmetric},
    )
    quantizer.quantize_model()
    result = in_order(quantizer.model.model)
    del result.opset_import[len(model.opset_import) :]  # com.microsoft: no node uses it
    float_outputs = {layer.node for layer in found if layer.float_output}
    _drop_output_pairs(result, float_outputs)
    _restore_biases(result, model, float_outputs)
    return result


def _round_inputs(model: onnx.ModelProto, layers: Iterable[Layer], ranges: Mapping[str, Range]) -> None:
    """Put a Q/DQ pair before these layers, uint8 with a zero point, in place.

    before:  %y = MatMul(%x, %w)
    after:   %1 = QuantizeLinear(%x, scale, zero point);  %2 = DequantizeLinear(%1, ..);  %y = MatMul(%2, %w)
    """
    from onnx import helper, numpy_helper
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    graph, keys = model.graph, activations(list(layers))
    for layer in layers:
        covered = ranges[keys[layer.reads]]
        low, high = np.float32(covered.low), np.float32(covered.high)
        zero_point, scale = compute_scale_zp(low, high, np.array(0, np.uint8), np.array(255, np.uint8))
        given = [f"{layer.module}/{end}" for end in ("input_scale", "input_zero_point")]
        values = np.asarray(scale, np.float32).reshape(()), np.asarray(zero_point, np.uint8).reshape(())
        graph.initializer.extend(map(numpy_helper.from_array, values, given))
        rounded, read = f"{layer.module}/input{QUANTIZED}", f"{layer.module}/input"
        at, node = next((i, node) for i, node in enumerate(graph.node) if node.name == layer.node)
        node.input[0] = read
        graph.node.insert(at, helper.make_node("DequantizeLinear", [rounded, *given], [read]))
        graph.node.insert(at, helper.make_node("QuantizeLinear", [layer.reads, *given], [rounded]))


def _drop_output_pairs(model: onnx.ModelProto, nodes: Collection[str]) -> int:
    """Remove the Q/DQ pairs after these nodes, so that the outputs are no longer rounded. Returns how many.

    before:  %1 = MatMul(..);  %2 = QuantizeLinear(%1);  %3 = DequantizeLinear(%2);  %4 = Add(%3, ..)
    after:   %1 = MatMul(..);  %4 = Add(%1, ..)                  if %3 is an output of the graph: %3 = MatMul(..)
    """
    graph = model.graph
    results = {value.name for value in graph.output}
    layers = {node.output[0]: node for node in graph.node if node.name in nodes}
    quantized = {n.output[0]: n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in layers}
    pairs = {n.output[0]: (n, quantized[n.input[0]]) for n in graph.node if n.input and n.input[0] in quantized}
    names = {name: quantizer.input[0] for name, (_, quantizer) in pairs.items()}
    kept = {
        written: name for name, written in names.items() if name in results
    }  # an output of the graph keeps its name
    for node in graph.node:
        for i, name in enumerate(node.input):
            name = names.get(name, name)
            node.input[i] = kept.get(name, name)
    for written, name in kept.items():
        layers[written].output[0] = name
    for dequantize, quantizer in pairs.values():
        graph.node.remove(dequantize)
        if quantizer in graph.node:
            graph.node.remove(quantizer)
    return len(pairs)


def _restore_biases(model: onnx.ModelProto, original: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Give these nodes their float bias back: an int32 bias is only for nodes whose output is rounded."""
    graph = model.graph
    biases = {node.name: node.input[2] for node in original.graph.node if node.name in nodes and len(node.input) > 2}
    tensors = {tensor.name: tensor for tensor in original.graph.initializer}
    present = {tensor.name for tensor in graph.initializer}
    gone = set()
    for node in graph.node:
        bias = biases.get(node.name)
        if bias:
            gone.add(node.input[2])
            node.input[2] = bias
            if bias not in present:
                graph.initializer.add().CopyFrom(tensors[bias])
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear" and node.output[0] in gone]:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _name_after_readers(model: onnx.ModelProto) -> None:
    """Name the new nodes after the module that reads their output, such as layers.2.1.conv_dw.0/DequantizeLinear."""
    module_of: dict[str, str] = {}  # by tensor
    used = {node.name for node in model.graph.node}
    for node in reversed(model.graph.node):
        if "/" not in node.name:
            module = next((module_of[name] for name in node.output if name in module_of), "root")
            name, count = f"{module}/{node.op_type}", 0
            while (unique := f"{name}_{count}" if count else name) in used:
                count += 1
            node.name = unique
            used.add(unique)
        module_of.update({name: node.name.rpartition("/")[0] for name in node.input})


def _store_weights(
    model: onnx.ModelProto, weights: Collection[str], *, dequantize: bool, largest: int = LARGEST_WEIGHT[8]
) -> int:
    """Store these initializers as int8 with one scale per output channel, in place. Returns how many.

    before:  Conv(%x, W float32)
    after:   %1 = Cast(W int8);  %w = Mul(%1, scale);  Conv(%x, %w)

    ONNX Runtime computes Cast and Mul once, when it loads the file: the network is then a float one, and as fast.
    With `dequantize` the graph has %w = DequantizeLinear(W int8, scale) instead. TensorRT recognises this node as
    quantised weights; ONNX Runtime would compute this node at every inference.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    stored = [tensor for tensor in graph.initializer if tensor.name in weights]
    for tensor in stored:
        value, name = numpy_helper.to_array(tensor), tensor.name
        axis, summed = _axes(model, name, value.ndim)
        magnitude = np.maximum(np.abs(value).max(axis=summed, keepdims=True), SMALLEST_SCALE)
        scale = magnitude.astype(np.float32) / np.float32(largest)
        rounded = np.clip(np.rint(value / scale), -largest, largest).astype(np.int8)
        int8, scales, unscaled = f"{name}{QUANTIZED}", f"{name}_scale", f"{name}_unscaled"
        tensor.CopyFrom(numpy_helper.from_array(rounded, int8))
        graph.initializer.append(numpy_helper.from_array(scale.ravel() if dequantize else scale, scales))
        if dequantize:
            nodes = [helper.make_node("DequantizeLinear", [int8, scales], [name], axis=axis)]
        else:
            cast = helper.make_node("Cast", [int8], [unscaled], to=TensorProto.FLOAT)
            nodes = [cast, helper.make_node("Mul", [unscaled, scales], [name])]
        first = next(i for i, node in enumerate(graph.node) if name in node.input)
        for node in reversed(nodes):
            graph.node.insert(first, node)
    return len(stored)


def _axes(model: onnx.ModelProto, weight: str, rank: int) -> tuple[int, tuple[int, ...]]:
    """Return the axis of output channels of a weight, and the axes that its layer sums over.

    The output channels of a convolution or transposed matrix are on axis 0, of matrices (.., in, out) on the last.
    """
    user = next(node for node in model.graph.node if weight in node.input)
    if user.op_type == "Conv" or any(attribute.name == "transB" and attribute.i for attribute in user.attribute):
        return 0, tuple(range(1, rank))
    return rank - 1, (rank - 2,)

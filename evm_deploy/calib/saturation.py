"""Layers whose integer products saturate on x86 CPUs without VNNI, found in a quantised graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

UINT8, INT16 = np.iinfo(np.uint8), np.iinfo(np.int16)


def saturating_weights(model: onnx.ModelProto) -> list[str]:
    """Return the names of the int8 weights in Q/DQ form whose products with uint8 activations can saturate.

    Without VNNI, the x86 kernels of ONNX Runtime and OpenVINO multiply with `vpmaddubsw`, which adds the products of
    two neighbours in 16 bits and saturates. The weights listed here exceed 16 bits for some two weights of an output
    channel and some activations. For all others every kernel gives the exact sum, whatever weights it makes neighbours:
    their results are the same, bit for bit, with and without VNNI.
    """
    from onnx import TensorProto, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    found = []
    for node in model.graph.node:
        tensor = weights.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is None or len(tensor.dims) < 2:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if can_saturate(np.moveaxis(numpy_helper.to_array(tensor), axis, 0)):
            found.append(tensor.name)
    return found


def can_saturate(weights: NDArray[np.int8]) -> bool:
    """Test whether two products of int8 weights (output channels, ..) and uint8 activations can exceed 16 bits."""
    channels = weights.reshape(len(weights), -1).astype(np.int64)
    ends = np.sort(np.pad(channels, ((0, 0), (2, 2))), axis=1)  # an activation may be 0: so may each product
    highest, lowest = ends[:, -2:].sum(axis=1), ends[:, :2].sum(axis=1)
    return bool((UINT8.max * highest > INT16.max).any() or (UINT8.max * lowest < INT16.min).any())

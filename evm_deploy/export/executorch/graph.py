"""Passes on the graph of a program, for forms that ExecuTorch lowers badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

SIZES = {"strides": 1, "dilations": 1, "kernel_shape": 1}  # attributes of a Conv, with the value for the new axis


def widen_convolutions(model: onnx.ModelProto) -> int:
    """Give convolutions over one axis a second axis, of size 1, in place. Returns how many.

    XNNPACK has convolutions over two axes alone. Its own pass (ExecuTorch 1.5.1) reshapes the weights of a convolution
    in place, and fails at the second convolution with the same weights.

    before:  %y = Conv(%x, W, b)                                                  W (O, I, k)
    after:   %1 = Unsqueeze(%x, [2]);  %2 = Conv(%1, W', b);  %y = Squeeze(%2, [2])         W' (O, I, 1, k)
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    kept: list[onnx.NodeProto] = []
    axis, count = "widened/axis", 0
    for node in graph.node:
        weight = tensors.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or len(weight.dims) != 3:
            kept.append(node)
            continue
        wide = f"{weight.name}/widened"
        if wide not in tensors:
            values = numpy_helper.to_array(weight)[:, :, None]
            tensors[wide] = graph.initializer.add()
            tensors[wide].CopyFrom(numpy_helper.from_array(values, wide))
        if axis not in tensors:
            tensors[axis] = graph.initializer.add()
            tensors[axis].CopyFrom(numpy_helper.from_array(np.array([2], np.int64), axis))
        for attribute in node.attribute:
            attribute.ints[:] = _widened(attribute.name, list(attribute.ints))
        x, y = f"{node.name}/x", f"{node.name}/y"
        kept.append(helper.make_node("Unsqueeze", [node.input[0], axis], [x], name=f"{node.name}/Unsqueeze"))
        kept.append(node)
        kept.append(helper.make_node("Squeeze", [y, axis], [node.output[0]], name=f"{node.name}/Squeeze"))
        node.input[0], node.input[1], node.output[0] = x, wide, y
        count += 1
    del graph.node[:]
    graph.node.extend(kept)
    return count


def _widened(name: str, values: Sequence[int]) -> Sequence[int]:
    """Return the values of an attribute of a Conv for a new first axis of size 1."""
    if name == "pads":
        return [0, values[0], 0, values[1]]
    return [SIZES[name], *values] if name in SIZES else values

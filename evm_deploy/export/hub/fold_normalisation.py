"""Folding of mean and std into the first convolution."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


def fold_normalisation(model: onnx.ModelProto) -> int:
    """Fold the scale and shift of pixels into the convolution that reads them. Returns 1, or 0 for no change.

    before:  %1 = Cast(%image);  %2 = Mul(%1, scale);  %3 = Add(%2, shift);  %4 = Transpose(%3);  %5 = Conv(%4, W, b)
    after:   %1 = Cast(%image);  %4 = Transpose(%1);  %5 = Conv(%4, W * scale, b + sum(W * shift))

    Exact up to rounding. Only for a convolution without padding, because a padded zero is not a normalised pixel.
    Weights that another node also reads stay unchanged: this convolution gets copies. Saves two passes over the image.
    """
    from onnx import numpy_helper

    graph = model.graph
    chain = _chain(graph)
    if not chain:
        return 0
    cast, mul, add, transpose, conv = chain
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    parameters = [mul.input[1], add.input[1], *conv.input[1:]]
    if len(parameters) != 4 or not all(name in tensors for name in parameters):
        return 0
    scale, shift, weight, bias = (numpy_helper.to_array(tensors[name]).astype(np.float64) for name in parameters)
    if scale.ndim != 1 or scale.shape != shift.shape or weight.shape[1] != len(scale):
        return 0
    read = Counter(name for node in graph.node for name in node.input)
    folded = (weight * scale[:, None, None], bias + np.einsum("ochw,c->o", weight, shift))
    for i, value in enumerate(folded, start=1):
        name = conv.input[i]
        if read[name] > 1:
            conv.input[i] = name = f"{name}_normalised"
            tensors[name] = graph.initializer.add()
        tensors[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    transpose.input[0] = cast.output[0]
    for node in (mul, add):
        graph.node.remove(node)
    still_used = {name for node in graph.node for name in node.input}
    for name in dict.fromkeys(parameters):
        if name not in still_used:
            graph.initializer.remove(tensors[name])
    gone = {mul.output[0], add.output[0]}
    for value in [value for value in graph.value_info if value.name in gone | {transpose.output[0]}]:
        graph.value_info.remove(value)
    return 1


def _chain(graph: onnx.GraphProto) -> list[onnx.NodeProto] | None:
    """Return the nodes Cast, Mul, Add, Transpose, Conv behind the graph's input, or None.

    Each must be the only reader of the node before it. The Conv must have no padding and one group.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    name, chain = graph.input[0].name, []
    for op_type in ("Cast", "Mul", "Add", "Transpose", "Conv"):
        found = readers.get(name, [])
        if len(found) != 1 or found[0].op_type != op_type or found[0].input[0] != name:
            return None
        chain.append(found[0])
        name = found[0].output[0]
    pads = [value for attribute in chain[-1].attribute if attribute.name == "pads" for value in attribute.ints]
    group = [attribute.i for attribute in chain[-1].attribute if attribute.name == "group"]
    return chain if not any(pads) and group in ([], [1]) else None

"""SmoothQuant (arXiv:2211.10438): make the channels of an activation similar in size, by factors moved into weights.

An activation has one int8 scale for all channels, so one large channel makes the steps too coarse for the others.
Weights have a scale per output channel, and can absorb the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.calib.table import channel_maxima

if TYPE_CHECKING:
    import onnx

ALPHA = 0.5  # 0: make weights similar in size, 1: activations

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Channels:
    """Channel axis of a tensor. The axis is negative, because broadcasting aligns the last axes."""

    tensor: str
    axis: int


@dataclass(frozen=True)
class SmoothGroup:
    """Constants to divide by a factor per channel, and others to multiply by the factor, so that outputs stay the same.

    node: name of the node with the divided constants. reads: activations that the multiplied weights read.
    """

    node: str
    divide: tuple[Channels, ...]
    multiply: tuple[Channels, ...]
    reads: tuple[Channels, ...]


def smooth_groups(model: onnx.ModelProto) -> list[SmoothGroup]:
    """Return the smooth groups of a graph in execution order: a LayerNormalization or Conv and all layers that read it.

    In between, only ops that a positive factor passes through are allowed: Relu, Transpose, products, and means over
    positions.
    """
    view = _View(model)
    found = []
    for node in model.graph.node:
        output, divide = view.producer(node)
        readers = view.readers_of(output) if divide else None
        if not readers:
            continue
        weights, reads = zip(*readers, strict=True)
        constants = (*divide, *weights)
        once = len({constant.tensor for constant in constants}) == len(constants)
        alone = once and all(len(view.readers[constant.tensor]) == 1 for constant in constants)
        if alone and len({view.constants[constant.tensor].dims[constant.axis] for constant in constants}) == 1:
            found.append(SmoothGroup(node.name, divide, weights, tuple(dict.fromkeys(reads))))
    return found


def smooth(model: onnx.ModelProto, largest: Mapping[str, Array]) -> int:
    """Smooth the activations of a graph, in place. Outputs change by rounding only. Returns the number of groups.

    largest: tensor -> max |x| per channel. A group that reads none of these tensors is left unchanged.

    before:  %1 = LayerNormalization(%0, gamma, beta);          %2 = MatMul(%1, W);             %3 = Conv(%1, D)
    after:   %1 = LayerNormalization(%0, gamma / s, beta / s);  %2 = MatMul(%1, s[:, None] W);  %3 = Conv(%1, s D)

    s = max |x| ** ALPHA / max |w| ** (1 - ALPHA) of each channel, with w all weights that read the channel. Then s is
    scaled to a geometric mean of 1.
    """
    done = 0
    for folding in smooth_groups(model):
        sizes = [largest[read.tensor] for read in folding.reads if read.tensor in largest]
        if sizes:
            fold(model, folding, _factors(model, folding, np.max(sizes, axis=0)))
            done += 1
    return done


def fold(model: onnx.ModelProto, folding: SmoothGroup, factors: Array) -> None:
    """Divide and multiply the constants of a group by `factors`, positive, one per channel. Changes `model`."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for constants, by in ((folding.divide, 1 / factors), (folding.multiply, factors)):
        for constant in constants:
            value = numpy_helper.to_array(tensors[constant.tensor])
            scaled = value * _along(by, constant.axis)
            tensors[constant.tensor].CopyFrom(numpy_helper.from_array(scaled.astype(value.dtype), constant.tensor))


def _factors(model: onnx.ModelProto, folding: SmoothGroup, activation: Array) -> NDArray[np.float64]:
    """Return SmoothQuant's factors, float64. The factor is 1 for a channel that is always zero or never used."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [np.moveaxis(numpy_helper.to_array(tensors[w.tensor]), w.axis, -1) for w in folding.multiply]
    weight = np.max([channel_maxima(value) for value in weights], axis=0).astype(np.float64)
    used = (activation > 0) & (weight > 0)
    factors = np.where(used, activation, 1) ** ALPHA / np.where(used, weight, 1) ** (1 - ALPHA)
    mean = np.exp(np.log(factors[used]).mean()) if used.any() else 1
    return np.where(used, factors / mean, 1)


def _along(values: Array, axis: int) -> Array:
    """Reshape `values`, one per channel, for broadcasting along a negative axis."""
    return values.reshape(-1, *[1] * (-axis - 1))


class _View:
    """Index of a graph: constants, outputs, ranks and readers by tensor name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def producer(self, node: onnx.NodeProto) -> tuple[Channels, tuple[Channels, ...]]:
        """Return the output of `node`, and the constants that scale the output by channel; () if there are none."""
        output, constants = node.output[0], [name for name in node.input[1:] if name in self.constants]
        rank = len(self.constants[constants[0]].dims) if constants else 0
        vectors = tuple(Channels(name, -1) for name in constants[1:])
        if len(constants) == len(node.input) - 1:
            if node.op_type == "LayerNormalization" and rank == 1:
                return Channels(output, -1), (Channels(constants[0], -1), *vectors)
            if node.op_type == "Conv":
                return Channels(output, 1 - rank), (Channels(constants[0], -rank), *vectors)
        return Channels(output, -1), ()

    def readers_of(self, source: Channels) -> list[tuple[Channels, Channels]] | None:
        """Return every weight that a factor in `source` reaches, with its activation; None if a factor cannot pass."""
        if source.tensor in self.outputs:
            return None
        found = []
        for node in self.readers.get(source.tensor, []):
            weight = self._weight(node, source)
            onward = self._onward(node, source)
            if weight:
                found.append((weight, source))
                continue
            further = self.readers_of(onward) if onward else None
            if further is None:
                return None
            found += further
        return found

    def _weight(self, node: onnx.NodeProto, source: Channels) -> Channels | None:
        """Return the weight of a layer that reads `source`, with the axis of input channels, or None."""
        if len(node.input) < 2 or node.input[0] != source.tensor or node.input[1] not in self.constants:
            return None
        name = node.input[1]
        rank = len(self.constants[name].dims)
        if node.op_type == "MatMul" and rank == 2 and source.axis == -1:
            return Channels(name, -2)
        if node.op_type == "Conv" and source.axis == 1 - rank:
            groups = _attribute(node, "group", 1)
            if groups == 1:
                return Channels(name, 1 - rank)
            if groups == self.constants[name].dims[0]:  # depthwise
                return Channels(name, -rank)
        return None

    def _onward(self, node: onnx.NodeProto, source: Channels) -> Channels | None:
        """Return the output through which a factor in `source` leaves `node`. None if the factor cannot pass."""
        output, axis = node.output[0], source.axis
        if node.op_type in ("Relu", "Mul"):
            return Channels(output, axis)
        if node.op_type == "Transpose":
            order = list(_attribute(node, "perm", []))
            return Channels(output, order.index(len(order) + axis) - len(order))
        if node.op_type == "ReduceMean" and node.input[1] in self.constants and source.tensor in self.ranks:
            from onnx import numpy_helper

            rank = self.ranks[source.tensor]
            over = {int(i) % rank - rank for i in numpy_helper.to_array(self.constants[node.input[1]])}
            gone = 0 if _attribute(node, "keepdims", 1) else sum(i > axis for i in over)
            return Channels(output, axis + gone) if axis not in over else None
        return None


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

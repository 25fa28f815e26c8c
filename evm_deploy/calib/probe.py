"""Probes: outputs of a candidate network that show the maps from which its answers are made.

Noise cannot be measured on answers, such as boxes and label maps: a small error moves one or changes nothing. So a
network that ends with a selection is evaluated with more outputs, which hold a sample of what the selection reads.
The exported artifact has none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.tasks.task import SELECTION

if TYPE_CHECKING:
    import onnx

PREFIX = "probe"
SAMPLE = 1024  # values of a map that are looked at: those of the float network are kept for each image


def is_probe(name: str) -> bool:
    """Test whether an output is a probe."""
    return name.startswith(PREFIX)


def with_probes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` with a probe for each module whose maps the selection reads; none without a selection.

    before:  %1 = Conv(..)  -> selection;   %2 = Conv(..)  -> selection       the same module on two levels
    after:   probe0 = Concat(Gather(Flatten(%1)), Gather(Flatten(%2)))        (b, values) float32

    Values are drawn with a fixed seed, SAMPLE of each map.
    """
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    result, found = copy.deepcopy(model), maps_read(model)
    if not found:
        return result
    graph = result.graph
    inferred = shape_inference.infer_shapes(model).graph
    sizes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.value_info}
    for number, maps in enumerate(found.values()):
        parts = []
        for name in maps:
            count = int(np.prod(sizes[name][1:]))
            flat, index, part = (f"{PREFIX}/{name}/{what}" for what in ("flat", "index", "sample"))
            graph.initializer.append(numpy_helper.from_array(drawn(count), index))
            graph.node.append(helper.make_node("Flatten", [name], [flat], name=f"{flat}/Flatten", axis=1))
            graph.node.append(helper.make_node("Gather", [flat, index], [part], name=f"{part}/Gather", axis=1))
            parts.append(part)
        output = f"{PREFIX}{number}"
        graph.node.append(helper.make_node("Concat", parts, [output], name=f"{output}/Concat", axis=1))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, [None, None]))
    return result


def drawn(count: int) -> NDArray[np.int64]:
    """Return the places of the values that a probe shows of a map of `count` values, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:SAMPLE])


def sampled(maps: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return the probe of some maps (b, ..): the drawn values of each, (b, values) float32."""
    flat = [each.reshape(len(each), -1) for each in maps]
    return np.concatenate([each[:, drawn(each.shape[1])] for each in flat], 1).astype(np.float32)


def without_probes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` without its probes."""
    result = copy.deepcopy(model)
    graph = result.graph
    for field in (graph.node, graph.initializer):
        kept = [each for each in field if not each.name.startswith(PREFIX)]
        del field[:]
        field.extend(kept)
    outputs = [value for value in graph.output if not is_probe(value.name)]
    del graph.output[:]
    graph.output.extend(outputs)
    return result


def maps_read(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the float tensors that the selection reads from outside of it, by the module that writes them, sorted.

    Tensors of a second stage, which depend on the selection themselves, have a row for each region, and are left out.
    """
    import onnx

    inside = [node for node in model.graph.node if _selects(node.name)]
    producers = {name: node for node in model.graph.node for name in node.output}
    own: set[str] = set()
    for node in model.graph.node:  # in order of execution
        if _selects(node.name) or own.intersection(node.input):
            own.update(node.output)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for node in inside for name in node.input if name in producers and name not in own):
        if types.get(name) == onnx.TensorProto.FLOAT:
            found.setdefault(producers[name].name.rpartition("/")[0], []).append(name)
    return dict(sorted(found.items()))


def _selects(node: str) -> bool:
    """Test whether a node, by name, is a part of the selection."""
    return node.startswith((f"{SELECTION}/", f"{SELECTION}."))

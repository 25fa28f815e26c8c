"""Rules for operators that choose values by their size or place, and running sums."""

from __future__ import annotations

import numpy as np

from evm_deploy.export.litert.layout import identity, last, permuted
from evm_deploy.export.litert.translate import Node, Rule, Translation, Value


def top(t: Translation, node: Node) -> None:
    """Translate TopK of the largest values along any axis."""
    x, count = node.input(0), node.constant(1)
    assert count is not None
    if not node.get("largest", 1):
        raise node.refused("the smallest values are asked for")
    order = last(x.order, node.get("axis", -1) % x.rank)
    shape = permuted(t.shapes[node.outputs[0]][0], order)
    values, places = (
        t.file.tensor(name or "unused", shape, dtype)
        for name, dtype in zip(node.outputs, (x.dtype, "int32"), strict=True)
    )
    t.file.operator(
        "TOPK_V2", [t.arranged(x, order), t.constant(np.array(int(count.item()), np.int32))], [values, places]
    )
    for index, tensor in enumerate((values, places)):
        if node.outputs[index]:
            t.write(node, tensor, order, index)


def gather_elements(t: Translation, node: Node) -> None:
    """Translate GatherElements: GatherNd at the places of the indices, the other axes counted."""
    x, index = tensor_of(t, node.input(0)), node.input(1)
    axis = node.get("axis", 0) % x.rank
    shape = (*index.shape, 1)
    parts = []
    for each in range(x.rank):
        if each == axis:
            parts.append(t.reshape(positive(t, index, x.shape[axis]), shape))
        else:
            counted = np.arange(index.shape[each]).reshape([-1 if i == each else 1 for i in range(x.rank + 1)])
            parts.append(t.constant(np.broadcast_to(counted, shape)))
    places = t.add("CONCATENATION", parts, (*index.shape, x.rank), "int32", axis=x.rank)
    t.emit(node, "GATHER_ND", [t.arranged(x), places], identity(x.rank))


def gather_nd(t: Translation, node: Node) -> None:
    """Translate GatherND without batch axes."""
    if node.get("batch_dims", 0):
        raise node.refused("batch_dims")
    x, index = tensor_of(t, node.input(0)), node.input(1)
    t.emit(node, "GATHER_ND", [t.arranged(x), t.arranged(index)], identity(len(t.shapes[node.outputs[0]][0])))


def tensor_of(t: Translation, value: Value) -> Value:
    """Return a value that is in the file, also if it was a constant."""
    if value.data is None:
        return value
    tensor = t.constant(value.data)
    return Value(value.shape, t.file.dtypes[tensor], tensor, identity(value.rank))


def positive(t: Translation, index: Value, size: int) -> int:
    """Return the tensor of indices along an axis of this size; ONNX counts negative ones from its end."""
    if index.data is not None:
        return t.constant(index.data % size)
    shape = index.shape
    return t.add("FLOOR_MOD", [t.arranged(index), t.constant(np.array(size, np.int32))], shape)


def running_sum(t: Translation, node: Node) -> None:
    """Translate CumSum."""
    x, axis = node.input(0), node.constant(1)
    assert axis is not None
    place = t.constant(np.array(x.order.index(int(axis.item()) % x.rank), np.int32))
    how = {"exclusive": bool(node.get("exclusive", 0)), "reverse": bool(node.get("reverse", 0))}
    t.emit(node, "CUMSUM", [x.tensor, place], x.order, **how)


RULES: dict[str, Rule] = {
    "CumSum": running_sum,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "TopK": top,
}

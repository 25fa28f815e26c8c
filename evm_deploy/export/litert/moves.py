"""Rules for ONNX operators that move, repeat, cut or join data."""

from __future__ import annotations

from math import prod

import numpy as np

from evm_deploy.export.litert.layout import identity, permuted, reshaped, transposed
from evm_deploy.export.litert.translate import Node, Rule, Translation, Value


def identical(t: Translation, node: Node) -> None:
    """Translate Identity and Dropout: the same tensor."""
    x = node.input(0)
    t.write(node, x.tensor, x.order, rounded=x.rounded)


def transpose(t: Translation, node: Node) -> None:
    """Translate Transpose: the same tensor in another order."""
    x = node.input(0)
    perm = node.get("perm") or [*reversed(range(x.rank))]
    t.write(node, x.tensor, transposed(x.order, perm), rounded=x.rounded)


def reshape(t: Translation, node: Node) -> None:
    """Translate Reshape, Squeeze, Unsqueeze, Flatten and Expand of nothing: data move only where they must."""
    x, after = node.input(0), t.shapes[node.outputs[0]][0]
    order = reshaped(x.shape, after, x.order)
    source = x.tensor
    if order is None:
        order, source = identity(len(after)), t.arranged(x)
    t.write(node, t.reshape(source, permuted(after, order)), order)


def concat(t: Translation, node: Node) -> None:
    """Translate Concat in the order of the largest input."""
    values = [value for value in node.inputs if value]
    axis = node.get("axis") % values[0].rank
    order = max((value for value in values if value.data is None), key=lambda value: value.size).order
    tensors = [t.arranged(value, order) for value in values]
    t.emit(node, "CONCATENATION", tensors, order, axis=order.index(axis))


def split(t: Translation, node: Node) -> None:
    """Translate Split: TFLite's own for equal parts, else a Slice for each."""
    x = node.input(0)
    axis = node.get("axis", 0) % x.rank
    sizes = [t.shapes[name][0][axis] for name in node.outputs]
    at = x.order.index(axis)
    if len({*sizes}) == 1:
        made = [t.file.tensor(name, permuted(t.shapes[name][0], x.order), x.dtype) for name in node.outputs]
        t.file.operator("SPLIT", [t.constant(np.array(at, np.int32)), x.tensor], made, numSplits=len(sizes))
        for index, tensor in enumerate(made):
            t.write(node, tensor, x.order, index)
        return
    start = 0
    for index, size in enumerate(sizes):
        t.write(node, cut(t, x.tensor, at, start, size, node.outputs[index]), x.order, index)
        start += size


def cut(t: Translation, tensor: int, at: int, start: int, size: int, name: str = "") -> int:
    """Return the part of a tensor from `start` along axis `at`; the tensor itself if that is all."""
    shape = [*t.file.shapes[tensor]]
    if size == shape[at]:
        return tensor
    shape[at] = size
    begin = [start if axis == at else 0 for axis in range(len(shape))]
    return t.add("SLICE", [tensor, t.constant(begin), t.constant(shape)], shape, name=name)


def slice_(t: Translation, node: Node) -> None:
    """Translate Slice, also with steps and backwards."""
    x = node.input(0)
    starts, ends = (np.asarray(node.constant(i)).tolist() for i in (1, 2))
    axes = range(len(starts)) if node.given(3) is None else np.asarray(node.constant(3)).tolist()
    steps = [1] * len(starts) if node.given(4) is None else np.asarray(node.constant(4)).tolist()
    tensor = x.tensor
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        at = x.order.index(axis % x.rank)
        size = t.file.shapes[tensor][at]
        places = range(size)[slice(start, end, step)]
        if step < 0:
            tensor = t.add("REVERSE_V2", [tensor, t.constant([at])], t.file.shapes[tensor])
            places = range(size - 1 - places.start, size - 1 - places.stop, -step)
        if step in (1, -1):
            tensor = cut(t, tensor, at, places.start, len(places))
            continue
        shape = [*t.file.shapes[tensor]]
        begin, end_, stride = ([d] * len(shape) for d in (0, 0, 1))
        end_[:] = shape
        begin[at], end_[at], stride[at] = places.start, places[-1] + 1, places.step
        shape[at] = len(places)
        tensor = t.add("STRIDED_SLICE", [tensor, *map(t.constant, (begin, end_, stride))], shape)
    t.write(node, tensor, x.order)


def gather(t: Translation, node: Node) -> None:
    """Translate Gather: a Slice for one constant index, else TFLite's own."""
    x, index = node.input(0), node.input(1)
    if x.data is not None:
        tensor = t.constant(x.data)
        x = Value(x.shape, t.file.dtypes[tensor], tensor, identity(x.rank))
    axis = node.get("axis", 0) % x.rank
    if index.data is not None and index.size == 1:
        place = int(index.data.reshape(())) % x.shape[axis]
        part = cut(t, x.tensor, x.order.index(axis), place, 1)
        order = tuple(each - (each > axis) for each in x.order if each != axis)
        if index.rank:
            order = (*range(axis, axis + index.rank), *(e + index.rank * (e >= axis) for e in order))
        t.write(node, t.reshape(part, permuted(t.shapes[node.outputs[0]][0], order)), order)
        return
    places = t.arranged(index) if index.data is None else t.constant(index.data % x.shape[axis])
    t.emit(node, "GATHER", [t.arranged(x), places], identity(x.rank + index.rank - 1), axis=axis)


def pad(t: Translation, node: Node) -> None:
    """Translate Pad with a constant or by reflection."""
    x, mode = node.input(0), node.get("mode", "constant")
    pads = np.asarray(node.constant(1)).tolist()
    axes = [*range(x.rank)] if node.given(3) is None else [a % x.rank for a in np.asarray(node.constant(3)).tolist()]
    both = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    if any(min(each) < 0 for each in both.values()):
        raise node.refused("negative padding")
    table = t.constant(np.array([both.get(axis, (0, 0)) for axis in x.order], np.int32))
    value = node.constant(2)
    if mode == "reflect":
        t.emit(node, "MIRROR_PAD", [x.tensor, table], x.order, mode=t.file.schema.MirrorPadMode.REFLECT)
    elif mode != "constant":
        raise node.refused(f"mode {mode}")
    elif value is None or not np.any(value):
        t.emit(node, "PAD", [x.tensor, table], x.order)
    else:
        t.emit(node, "PADV2", [x.tensor, table, t.constant(np.array(value, x.dtype).reshape(1))], x.order)


def expand(t: Translation, node: Node) -> None:
    """Translate Expand: a Reshape if it adds axes of size 1 alone, else BroadcastTo."""
    x, after = node.input(0), t.shapes[node.outputs[0]][0]
    if x.size == prod(after):
        reshape(t, node)
        return
    missing = len(after) - x.rank
    order = (*range(missing), *(axis + missing for axis in x.order))
    shape = permuted(after, order)
    t.emit(node, "BROADCAST_TO", [x.tensor, t.constant([*shape])], order)


def tile(t: Translation, node: Node) -> None:
    """Translate Tile."""
    x, times = node.input(0), np.asarray(node.constant(1)).tolist()
    t.emit(node, "TILE", [x.tensor, t.constant([*permuted(times, x.order)])], x.order)


RULES: dict[str, Rule] = {
    "Concat": concat,
    "Expand": expand,
    "Flatten": reshape,
    "Gather": gather,
    "Identity": identical,
    "Pad": pad,
    "Reshape": reshape,
    "Slice": slice_,
    "Split": split,
    "Squeeze": reshape,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": reshape,
}

"""Rules for ONNX operators that compute element by element, or along axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evm_deploy.export.litert.flatbuffer import TYPES
from evm_deploy.export.litert.layout import Order, last, permuted
from evm_deploy.export.litert.rounding import VERSIONS, Operation
from evm_deploy.export.litert.translate import Node, Rule, Translation, Value

UNARY = {
    "Abs": "ABS",
    "Ceil": "CEIL",
    "Cos": "COS",
    "Exp": "EXP",
    "Floor": "FLOOR",
    "Log": "LOG",
    "Neg": "NEG",
    "Not": "LOGICAL_NOT",
    "Round": "ROUND",
    "Sigmoid": "LOGISTIC",
    "Sin": "SIN",
    "Sqrt": "SQRT",
    "Tanh": "TANH",
}
BINARY = {
    "Add": "ADD",
    "And": "LOGICAL_AND",
    "Div": "DIV",
    "Equal": "EQUAL",
    "Greater": "GREATER",
    "GreaterOrEqual": "GREATER_EQUAL",
    "Less": "LESS",
    "LessOrEqual": "LESS_EQUAL",
    "Mod": "FLOOR_MOD",
    "Mul": "MUL",
    "Or": "LOGICAL_OR",
    "Pow": "POW",
    "Sub": "SUB",
}
REDUCTIONS = {
    "ReduceMax": "REDUCE_MAX",
    "ReduceMean": "MEAN",
    "ReduceMin": "REDUCE_MIN",
    "ReduceSum": "SUM",
}
ERF_P = 0.3275911
ERF_SERIES = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)  # a5 .. a1
CLIPS: dict[tuple[float | None, float | None], str] = {
    (0.0, None): "RELU",
    (0.0, 6.0): "RELU6",
    (-1.0, 1.0): "RELU_N1_TO_1",
}


def unary(code: str, **options: Any) -> Rule:
    """Return the rule for an operator of one input that keeps its shape."""

    def rule(t: Translation, node: Node) -> None:
        x = node.input(0)
        t.emit(node, code, [x.tensor], x.order, **options)

    return rule


def binary(code: str) -> Rule:
    """Return the rule for an operator of two inputs that are broadcast."""

    def rule(t: Translation, node: Node) -> None:
        operation = Operation(t, node, (0, 1), exact=code not in VERSIONS)
        order, tensors = together(t, node, operation.values)
        shape, dtype = t.shapes[node.outputs[0]]
        operation.write(operation.add(code, tensors, permuted(shape, order), dtype=dtype), order)

    return rule


def folded(code: str) -> Rule:
    """Return the rule for an operator of any number of inputs that are broadcast, as operators of two."""

    def rule(t: Translation, node: Node) -> None:
        order, tensors = together(t, node, [value for value in node.inputs if value])
        dtype, found = t.shapes[node.outputs[0]][1], tensors[0]
        for other in tensors[1:-1]:
            common = np.broadcast_shapes(t.file.shapes[found], t.file.shapes[other])
            found = t.add(code, [found, other], common, dtype)
        if len(tensors) == 1:
            t.write(node, found, order)
        else:
            t.emit(node, code, [found, tensors[-1]], order)

    return rule


def together(t: Translation, node: Node, values: Sequence[Value]) -> tuple[Order, list[int]]:
    """Return the order of axes in which values are broadcast, and their tensors in it: that of the largest one."""
    rank = len(t.shapes[node.outputs[0]][0])
    largest = max((value for value in values if value.data is None), key=lambda value: (value.rank, value.size))
    order = (*range(rank - largest.rank), *(axis + rank - largest.rank for axis in largest.order))
    return order, [broadcast(t, value, order, whole=value is largest) for value in values]


def broadcast(t: Translation, value: Value, order: Order, *, whole: bool) -> int:
    """Return a tensor of a value in the order of a value of at least as many axes; missing axes come first.

    whole: with all of these axes. Else those of size 1 in front may be left out.
    """
    missing = len(order) - value.rank
    if value.data is not None:
        data = value.data.reshape((1,) * missing + value.shape)
        if data.size == 1:
            return t.constant(data.reshape(()))
        return t.constant(np.transpose(data, order))
    own = tuple(axis - missing for axis in order if axis >= missing)
    tensor = t.arranged(value, own)
    shape = [1 if axis < missing else value.shape[axis - missing] for axis in order]
    while not whole and len(shape) > value.rank and shape[0] == 1:
        del shape[0]
    return t.reshape(tensor, shape)


def cast(t: Translation, node: Node) -> None:
    """Translate Cast."""
    x = node.input(0)
    if x.dtype == t.shapes[node.outputs[0]][1]:
        t.write(node, x.tensor, x.order)
        return
    dtypes = (x.dtype, t.shapes[node.outputs[0]][1])
    given, wanted = (getattr(t.file.schema.TensorType, TYPES[dtype]) for dtype in dtypes)
    t.emit(node, "CAST", [x.tensor], x.order, inDataType=given, outDataType=wanted)


def clip(t: Translation, node: Node) -> None:
    """Translate Clip to Maximum and Minimum, or to the ReLU that it is."""
    x = node.input(0)
    low, high = (None if node.given(i) is None else float(node.constant(i)) for i in (1, 2))  # type: ignore[arg-type]
    if (low, high) in CLIPS:
        t.emit(node, CLIPS[low, high], [x.tensor], x.order)
        return
    tensor = x.tensor
    for code, limit in (("MAXIMUM", low), ("MINIMUM", high)):
        if limit is not None:
            tensor = t.add(code, [tensor, t.constant(np.array(limit).astype(x.dtype))], t.file.shapes[tensor])
    t.write(node, tensor, x.order)


def where(t: Translation, node: Node) -> None:
    """Translate Where."""
    order, tensors = together(t, node, [node.input(i) for i in range(3)])
    t.emit(node, "SELECT_V2", tensors, order)


def softplus(t: Translation, node: Node) -> None:
    """Translate Softplus: max(x, 0) + log(1 + exp(-|x|))."""
    x = node.input(0)
    shape, one = t.file.shapes[x.tensor], t.constant(1.0)
    e = t.add("EXP", [t.add("NEG", [t.add("ABS", [x.tensor], shape)], shape)], shape)
    tail = t.add("LOG", [t.add("ADD", [e, one], shape)], shape)
    t.emit(node, "ADD", [t.add("RELU", [x.tensor], shape), tail], x.order)


def erf(t: Translation, node: Node) -> None:
    """Translate Erf by formula 7.1.26 of Abramowitz and Stegun, whose error is at most 1.5e-7; TFLite has none.

    erf(x) = sign(x) (1 - t (a1 + t (a2 + ..)) exp(-x x)), t = 1 / (1 + p |x|)
    """
    x = node.input(0).tensor
    shape = t.file.shapes[x]

    def f(code: str, *inputs: int | float) -> int:
        return t.add(code, [t.constant(v) if isinstance(v, float) else v for v in inputs], shape, "float32")

    r = f("DIV", 1.0, f("ADD", f("MUL", f("ABS", x), ERF_P), 1.0))
    series = f("MUL", r, ERF_SERIES[0])
    for coefficient in ERF_SERIES[1:]:
        series = f("MUL", f("ADD", series, coefficient), r)
    rest = f("MUL", series, f("EXP", f("NEG", f("MUL", x, x))))
    t.emit(node, "MUL", [f("SIGN", x), f("SUB", 1.0, rest)], node.input(0).order)


def reciprocal(t: Translation, node: Node) -> None:
    """Translate Reciprocal: 1 / x."""
    x = node.input(0)
    t.emit(node, "DIV", [t.constant(1.0), x.tensor], x.order)


def reduction(code: str) -> Rule:
    """Return the rule for a reduction over constant axes."""

    def rule(t: Translation, node: Node) -> None:
        x, given = node.input(0), node.get("axes")
        if given is None and node.given(1) is not None:
            given = np.asarray(node.constant(1)).tolist()
        if not given and node.get("noop_with_empty_axes", 0):
            t.write(node, x.tensor, x.order)
            return
        operation = Operation(t, node, exact=code != "MEAN")
        (x,) = operation.values
        axes = sorted(axis % x.rank for axis in given or range(x.rank))
        kept = bool(node.get("keepdims", 1))
        places = t.constant(np.array(sorted(x.order.index(axis) for axis in axes), np.int32))
        order = x.order
        if not kept:
            order = tuple(axis - sum(each < axis for each in axes) for axis in x.order if axis not in axes)
        shape = permuted(t.shapes[node.outputs[0]][0], order)
        operation.write(operation.add(code, [x.tensor, places], shape, keepDims=kept), order)

    return rule


def softmax(t: Translation, node: Node) -> None:
    """Translate Softmax and LogSoftmax, which TFLite computes over the last axis."""
    x = node.input(0)
    order = last(x.order, node.get("axis", -1) % x.rank)
    if node.op == "Softmax":
        t.emit(node, "SOFTMAX", [t.arranged(x, order)], order, beta=1.0)
    else:
        t.emit(node, "LOG_SOFTMAX", [t.arranged(x, order)], order)


def argument(code: str) -> Rule:
    """Return the rule for ArgMax and ArgMin: the first of equal values."""

    def rule(t: Translation, node: Node) -> None:
        x = node.input(0)
        if node.get("select_last_index", 0):
            raise node.refused("the last of equal values is asked for")
        axis = node.get("axis", 0) % x.rank
        shape, dtype = t.shapes[node.outputs[0]]
        kept = bool(node.get("keepdims", 1))
        order = tuple(each - (each > axis) for each in x.order if each != axis)
        place = t.constant(np.array(x.order.index(axis), np.int32))
        squeezed = tuple(size for each, size in enumerate(shape) if not kept or each != axis)
        types = t.file.schema.TensorType
        found = t.add(code, [x.tensor, place], permuted(squeezed, order), dtype, outputType=types.INT32)
        final = (*(each + (each >= axis) for each in order), axis) if kept else order
        t.write(node, t.reshape(found, permuted(shape, final)), final)

    return rule


RULES: dict[str, Rule] = {
    **{op: unary(code) for op, code in UNARY.items()},
    **{op: binary(code) for op, code in BINARY.items()},
    **{op: reduction(code) for op, code in REDUCTIONS.items()},
    "ArgMax": argument("ARG_MAX"),
    "ArgMin": argument("ARG_MIN"),
    "Cast": cast,
    "Clip": clip,
    "Erf": erf,
    "LogSoftmax": softmax,
    "Max": folded("MAXIMUM"),
    "Min": folded("MINIMUM"),
    "Reciprocal": reciprocal,
    "Softmax": softmax,
    "Softplus": softplus,
    "Sum": folded("ADD"),
    "Where": where,
}

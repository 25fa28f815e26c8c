"""Rules for products of matrices, and Einsum as such a product."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from evm_deploy.export.litert.layout import identity, last, permuted
from evm_deploy.export.litert.rounding import Operation
from evm_deploy.export.litert.translate import Node, Rule, Translation, Value


def product(t: Translation, node: Node) -> None:
    """Translate MatMul: FullyConnected for a constant matrix, else BatchMatMul."""
    x, y = node.input(0), node.input(1)
    if y.data is not None and y.rank == 2 and x.rank >= 2:
        connected(t, node, (1, 0))
        return
    if min(x.rank, y.rank) < 2:
        raise node.refused("a product with a vector")
    rank = max(x.rank, y.rank)
    left, right = (
        t.reshape(t.arranged(v), (1,) * (rank - v.rank) + v.shape)
        if v.data is None
        else t.weight(v.data.reshape((1,) * (rank - v.rank) + v.shape), f"{node.name}/weight")
        for v in (x, y)
    )
    t.emit(node, "BATCH_MATMUL", [left, right], identity(rank))


def connected(t: Translation, node: Node, place: tuple[int, int], *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Add a FullyConnected. place: permutation of the weight's axes to (out, in). alpha, beta: of weight and bias."""
    operation = Operation(t, node, constants=(1, 2), relu=True, exact=(alpha, beta) != (1.0, 1.0))
    (x,) = operation.values
    order, shape = last(x.order, x.rank - 1), t.shapes[node.outputs[0]][0]
    columns = shape[-1]
    weight = operation.weight(place, (columns, x.shape[-1]), 0, alpha)
    bias = operation.bias(columns, beta) if node.given(2) else -1
    inputs = [t.arranged(x, order), weight, bias]
    operation.write(operation.add("FULLY_CONNECTED", inputs, permuted(shape, order), keepNumDims=True), order)


def gemm(t: Translation, node: Node) -> None:
    """Translate Gemm with a constant matrix."""
    if node.get("transA", 0) or node.constant(1) is None:
        raise node.refused("transA")
    place = (0, 1) if node.get("transB", 0) else (1, 0)
    connected(t, node, place, alpha=node.get("alpha", 1.0), beta=node.get("beta", 1.0))


def einsum(t: Translation, node: Node) -> None:
    """Translate Einsum of two inputs: axes of both and the result are a batch, axes of both alone are summed."""
    equation = str(node.get("equation")).replace(" ", "")
    reads, arrow, result = equation.partition("->")
    names = reads.split(",")
    if not arrow or "." in equation or len(names) != 2 or any(len({*name}) < len(name) for name in names):
        raise node.refused(f"equation {equation}")
    left, right = names
    batch = [each for each in result if each in left and each in right]
    rows, columns = ([each for each in result if each in own and each not in batch] for own in (left, right))
    summed = [each for each in left if each in right and each not in result]
    if {*left, *right} != {*batch, *rows, *columns, *summed}:
        raise node.refused(f"equation {equation}: an axis of one input alone is summed")
    sizes = dict(zip(left + right, node.input(0).shape + node.input(1).shape, strict=True))
    shape = [sizes[each] for each in (*batch, *rows, *columns)]

    def matrix(value: Value, own: str, first: Sequence[str], second: Sequence[str]) -> int:
        order = tuple(own.index(each) for each in (*batch, *first, *second))
        flat = [sizes[each] for each in batch] + [prod(sizes[each] for each in part) for part in (first, second)]
        if value.data is not None:
            return t.weight(np.transpose(value.data, order).reshape(flat), f"{node.name}/weight")
        return t.reshape(t.arranged(value, order), flat)

    x, y = node.input(0), node.input(1)
    flat = [*shape[: len(batch)], prod(sizes[each] for each in rows), prod(sizes[each] for each in columns)]
    if y.data is not None and not batch:
        inputs = [matrix(x, left, rows, summed), matrix(y, right, columns, summed), -1]
        made = t.add("FULLY_CONNECTED", inputs, flat, keepNumDims=True)
    else:
        made = t.add("BATCH_MATMUL", [matrix(x, left, rows, summed), matrix(y, right, summed, columns)], flat)
    order = tuple(result.index(each) for each in (*batch, *rows, *columns))
    t.write(node, t.reshape(made, shape), order)


RULES: dict[str, Rule] = {"Einsum": einsum, "Gemm": gemm, "MatMul": product}

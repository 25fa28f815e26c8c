"""Order of axes: where the axes of an ONNX value stand in the TFLite tensor that holds it.

TFLite's convolutions take channels last, ONNX's take channels first. Therefore a value has an order: axis i of its
tensor is axis `order[i]` of the value. A Transpose changes the order alone, and costs nothing. Operators that compute
along one axis, or element by element, keep the order of what they read. Data move where an operator needs another
order than it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Order = tuple[int, ...]


def permuted(values: Sequence[int], order: Order) -> tuple[int, ...]:
    """Return the values at the places that `order` names: a value's shape -> the shape of its tensor."""
    return tuple(values[axis] for axis in order)


def identity(rank: int) -> Order:
    """Return the order of a tensor whose axes are those of the value."""
    return tuple(range(rank))


def transposed(order: Order, perm: Sequence[int]) -> Order:
    """Return the order of the result of ONNX's Transpose: the same tensor, the axes of the value renamed."""
    return tuple(perm.index(axis) for axis in order)


def moves(order: Order, wanted: Order) -> Order:
    """Return the permutation of TFLite's Transpose that brings a tensor from one order to another."""
    return tuple(order.index(axis) for axis in wanted)


def same_data(shape: Sequence[int], order: Order, wanted: Order) -> bool:
    """Test whether two orders differ in axes of size 1 alone: a Reshape then does what a Transpose would."""
    return [axis for axis in order if shape[axis] != 1] == [axis for axis in wanted if shape[axis] != 1]


def last(order: Order, axis: int) -> Order:
    """Return the order with `axis` moved to the end."""
    return (*(each for each in order if each != axis), axis)


def reshaped(before: Sequence[int], after: Sequence[int], order: Order) -> Order | None:
    """Return the order of the result if a value is reshaped and its tensor keeps its data in place, or None.

    Axes form groups with equal products in both shapes: (32, 16, 16) -> (32, 8, 2, 16) has the groups 32 -> 32,
    16 -> 8, 2 and 16 -> 16. The data stay if the axes of each group stand side by side, in order. Axes of size 1
    belong to no group, and come first.
    """
    groups = _groups(before, after)
    found = [axis for axis in order if before[axis] != 1]
    placed: list[int] = [axis for axis, size in enumerate(after) if size == 1]
    while found:
        group = next((new for old, new in groups if found[: len(old)] == old), None)
        if group is None:
            return None
        old = next(old for old, new in groups if new is group)
        del found[: len(old)]
        placed += group
    return tuple(placed)


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of axes, without those of size 1, whose products are equal: old -> new."""
    old = [axis for axis, size in enumerate(before) if size != 1]
    new = [axis for axis, size in enumerate(after) if size != 1]
    found = []
    while old and new:
        left, right = [old.pop(0)], [new.pop(0)]
        while (have := prod(before[i] for i in left)) != (want := prod(after[i] for i in right)):
            side, source = (left, old) if have < want else (right, new)
            side.append(source.pop(0))
        found.append((left, right))
    return found

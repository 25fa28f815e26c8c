"""Chains of nodes that only move elements, such as Reshape and Transpose, and the shortest that do the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

Size = int | str  # of an axis; a text is the name of a size that is not known before run time


@dataclass(frozen=True)
class Movement:
    """A shortest chain: Reshape to `start`, Transpose by `perm`, Reshape to the result. None or False: no such node."""

    start: tuple[Size, ...] | None = None
    perm: tuple[int, ...] | None = None
    reshape: bool = False


@dataclass(eq=False)
class _Factor:
    """Factor of the size of an axis, more than 1."""

    size: Size


@dataclass
class _Axes:
    """Axes as products of factors: of the first value of a chain, and of the present one."""

    first: list[list[_Factor]]
    now: list[list[_Factor]] = field(default_factory=list)

    def regroup(self, shape: Sequence[Size]) -> bool:
        """Make the axes of a Reshape to `shape`. Returns False if the sizes do not divide each other."""
        flat, self.now = [factor for axis in self.now for factor in axis], []
        for size in shape:
            axis: list[_Factor] = []
            while size != 1:
                if not flat or not (part := self._take(flat, size)):
                    return False
                axis.append(part)
                size = 1 if part.size == size else int(size) // int(part.size)
            self.now.append(axis)
        return not flat

    def _take(self, flat: list[_Factor], size: Size) -> _Factor | None:
        """Remove the first factor of `flat`, or a part of it, that divides `size`."""
        factor = flat.pop(0)
        if factor.size == size:
            return factor
        if isinstance(size, str) or isinstance(factor.size, str):
            return None
        if size % factor.size == 0:
            return factor
        if factor.size % size:
            return None
        part, rest = _Factor(size), _Factor(factor.size // size)
        flat.insert(0, rest)
        for axis in self.first:
            if factor in axis:
                at = axis.index(factor)
                axis[at : at + 1] = [part, rest]
        return part


def movement(shapes: Sequence[Sequence[Size]], perms: Sequence[Sequence[int] | None]) -> Movement | None:
    """Return the shortest chain for a chain of nodes. None if a Reshape regroups sizes that do not divide each other.

    shapes: of the first input, then of the output of each node. perms: of each node, the permutation of a Transpose, or
    None for a Reshape. Factors that stay neighbours in the whole chain count as one; one Transpose is always enough.
    """
    factors = [[_Factor(size)] if size != 1 else [] for size in shapes[0]]
    axes = _Axes(factors, list(factors))
    for shape, perm in zip(shapes[1:], perms, strict=True):
        if perm is not None:
            axes.now = [axes.now[i] for i in perm]
        elif not axes.regroup(shape):
            return None
    position = {factor: i for i, factor in enumerate(f for axis in axes.now for f in axis)}
    runs: list[list[_Factor]] = []
    for factor in (f for axis in axes.first for f in axis):
        beside = runs and position[factor] == position[runs[-1][-1]] + 1
        if beside and not isinstance(factor.size, str) and not isinstance(runs[-1][-1].size, str):
            runs[-1].append(factor)
        else:
            runs.append([factor])
    last = list(shapes[-1])
    if [position[factor] for run in runs for factor in run] == list(range(len(position))):
        return Movement(reshape=list(shapes[0]) != last)
    run_of = {factor: i for i, run in enumerate(runs) for factor in run}
    if all(len({run_of[factor] for factor in axis}) <= 1 for axis in axes.first):  # a Transpose of the axes as they are
        begin, start = list(shapes[0]), None
        order = sorted((i for i, axis in enumerate(axes.first) if axis), key=lambda i: position[axes.first[i][0]])
    else:
        sizes = [run[0].size if len(run) == 1 else math.prod(int(f.size) for f in run) for run in runs]
        order = sorted(range(len(runs)), key=lambda i: position[runs[i][0]])
        ones = last.count(1) if [sizes[i] for i in order] == [size for size in last if size != 1] else 0
        begin = [*[1] * ones, *sizes]
        start, order = tuple(begin), [i + ones for i in order]
    fits = [begin[i] for i in order] == [size for size in last if size != 1] and begin.count(1) == last.count(1)
    ones_at, moved = iter([i for i, size in enumerate(begin) if size == 1]), iter(order)
    pattern = last if fits else begin  # axes of size 1 stay where they are if a Reshape follows
    return Movement(start, tuple(next(ones_at) if size == 1 else next(moved) for size in pattern), not fits)

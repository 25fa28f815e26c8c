"""The seam for the meaning of outputs: Task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Outputs = Mapping[str, NDArray[Any]]  # by name, the first axis counts images
Labels = NDArray[np.int64]  # (images,)


@dataclass(frozen=True)
class Prediction:
    """One class of one image. `score`: probability, 0..1."""

    label: str
    index: int
    score: float


Decode = Callable[[Outputs, Sequence[str] | None, int], list[list[Prediction]]]


class Spec(Protocol):
    """Type and shape of an output; None is a size that it does not tell."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int | None, ...]: ...


@dataclass(frozen=True)
class Task:
    """The meaning of a network's outputs. None: the task has no such function.

    heads: what a classifier or backbone may be asked for with --head, the first by default. gives: the outputs, in a
    word. `check(outputs, labels)`: for outputs that are none of the task's, what they are and what was expected.
    `decode(outputs, labels, top)`: per image the `top` best answers, best first. `score(outputs, labels)`: figures from
    0 to 1 against the truth, larger is better; `metric` is the one that gates. `agree(expected, actual)`: the share of
    images with the same answer.
    """

    name: str
    heads: tuple[str, ...]
    gives: str
    check: Callable[[Mapping[str, Spec], Sequence[str] | None], tuple[str, str] | None] | None = None
    decode: Decode | None = None
    score: Callable[[Outputs, Labels], dict[str, float]] | None = None
    agree: Callable[[Outputs, Outputs], float] | None = None
    metric: str = ""

"""The seam of what outputs mean: Task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Task:
    """What the outputs of a network mean. None: the task has no such thing.

    heads: what a classifier or backbone may be asked for with --head, the first by default.
    `decode(outputs, labels, top)`: per image the `top` best answers, best first. `score(outputs, labels)`: figures from
    0 to 1 against the truth, larger is better; `metric` is the one that gates. `agree(expected, actual)`: the share of
    images with the same answer.
    """

    name: str
    heads: tuple[str, ...]
    decode: Callable[[Outputs, Sequence[str] | None, int], list[list[Prediction]]] | None = None
    score: Callable[[Outputs, Labels], dict[str, float]] | None = None
    agree: Callable[[Outputs, Outputs], float] | None = None
    metric: str = ""

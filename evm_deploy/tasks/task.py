"""`Task`: the interface between outputs of a network and their meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Outputs = Mapping[str, NDArray[Any]]  # output name -> array; the first axis is the image
Labels = NDArray[np.int64]  # (images,)


@dataclass(frozen=True)
class Prediction:
    """Predicted class of an image. score: probability, 0..1."""

    label: str
    index: int
    score: float


Decode = Callable[[Outputs, Sequence[str] | None, int], list[list[Prediction]]]


class Spec(Protocol):
    """Dtype and shape of an output."""

    @property
    def dtype(self) -> str:
        """Numpy dtype name."""
        ...

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Size of each axis; None for an unknown size."""
        ...


@dataclass(frozen=True)
class Task:
    """Meaning of a network's outputs. A function that is None is not available for the task.

    heads: values of --head for the task; the first one is the default. gives: short noun for the outputs, used in
    messages.
    `check(outputs, labels)`: return None for valid outputs, else two texts: the actual outputs and the expectation.
    `decode(outputs, labels, top)`: return the `top` best answers per image, best first.
    `score(outputs, labels)`: return the metrics of each image against its true label, (images,) float64 by name, 0..1,
    larger is better. The metric of a set is the mean of its images. `metric` names the one that accuracy limits apply
    to.
    `agree(expected, actual)`: return 1 for each image with the same answer, else 0, (images,) float64.
    `compare(expected, actual)`: return figures on the difference of outputs that have no answer, (images,) float64 by
    name.
    """

    name: str
    heads: tuple[str, ...]
    gives: str
    check: Callable[[Mapping[str, Spec], Sequence[str] | None], tuple[str, str] | None] | None = None
    decode: Decode | None = None
    score: Callable[[Outputs, Labels], dict[str, NDArray[np.float64]]] | None = None
    agree: Callable[[Outputs, Outputs], NDArray[np.float64]] | None = None
    compare: Callable[[Outputs, Outputs], dict[str, NDArray[np.float64]]] | None = None
    metric: str = ""

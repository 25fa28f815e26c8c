"""`Task`: the interface between outputs of a network and their meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import DEFAULT_SELECTION, SelectionSettings
from evm_deploy.data.geometry import Geometry

if TYPE_CHECKING:
    from PIL.Image import Image

Outputs = Mapping[str, NDArray[Any]]  # output name -> array; the first axis is the image
Labels = NDArray[np.int64]  # (images,)
Colour = tuple[int, int, int]  # red, green, blue, 0..255


@dataclass(frozen=True)
class Prediction:
    """Predicted class of an image. score: probability, 0..1."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Detection(Prediction):
    """Detected object. box: x1, y1, x2, y2 in pixels of the upright original image, from its left and top edge."""

    box: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class LabelMap(Sequence[Prediction]):
    """Class of every pixel of an image. As a sequence: the classes that are present, by falling share of the pixels.

    map: (h, w) uint8 or int32, class index of each pixel of the upright original image. labels: class names, None
    without. palette: colour of each class as red, green, blue; None without. The score of a class is its share, 0..1.
    """

    map: NDArray[Any]
    labels: Sequence[str] | None = None
    palette: Sequence[Colour] | None = None

    @cached_property
    def present(self) -> tuple[Prediction, ...]:
        """Classes of at least one pixel, by falling share; equal shares by index."""
        classes, counts = np.unique(self.map, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return tuple(
            Prediction(class_name(self.labels, index), index, count / self.map.size)
            for index, count in zip(classes[order].tolist(), counts[order].tolist(), strict=True)
        )

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Prediction]: ...

    def __getitem__(self, index: int | slice) -> Prediction | Sequence[Prediction]:
        """Return one or several of the classes that are present."""
        return self.present[index]

    def __len__(self) -> int:
        return len(self.present)


def class_name(labels: Sequence[str] | None, index: int) -> str:
    """Return the name of a class; `class 7` for one without a name."""
    return labels[index] if labels and 0 <= index < len(labels) else f"class {index}"


@dataclass(frozen=True)
class Reading:
    """Facts beside the outputs that predictions are decoded with.

    labels: class names, None without. top: answers of a classifier for each image. places: place of each image in the
    network's input; None leaves boxes and label maps in pixels of that input. selection: that of a detector. palette:
    colour of each class as red, green, blue; None without.
    """

    labels: Sequence[str] | None = None
    top: int = 5
    places: Sequence[Geometry] | None = None
    selection: SelectionSettings = DEFAULT_SELECTION
    palette: Sequence[Colour] | None = None


Decode = Callable[[Outputs, Reading], Sequence[Sequence[Prediction]]]


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
    `decode(outputs, reading)`: return the answers of each image, best first.
    `score(outputs, labels)`: return the metrics of each image against its true label, (images,) float64 by name, 0..1,
    larger is better. The metric of a set is the mean of its images. `metric` names the one that accuracy limits apply
    to.
    `agree(expected, actual)`: return the share of the answers that are the same, for each image, (images,) float64.
    `compare(expected, actual)`: return figures on the difference of outputs that have no answer, (images,) float64 by
    name.
    `align(expected, actual)`: pair the rows of outputs whose order may differ. Returns the paired rows of both by name,
    to be compared value by value, and the share of rows that have a pair. None: outputs are compared as they are.
    `draw(image, predictions, least)`: return a copy of an upright image with the predictions from the score `least` on.
    selects: the artifact holds the last step from the network's maps to the outputs (the module of its `selection`),
    made for one size of the input; `decode` maps the outputs back to the image with `Reading.places`.
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
    align: Callable[[Outputs, Outputs], tuple[Outputs, Outputs, float]] | None = None
    draw: Callable[[Image, Any, float], Image] | None = None
    selects: bool = False

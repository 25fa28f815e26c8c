"""`Task`: the interface between outputs of a network and their meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.boxes import DEFAULT_SELECTION, SelectionSettings
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.masks import DetectedMask
from evm_deploy.data.sources import ImageItem

if TYPE_CHECKING:
    from PIL.Image import Image

Outputs = Mapping[str, NDArray[Any]]  # output name -> array; the first axis is the image
Rows = Mapping[str, NDArray[Any]]  # column -> values, (rows, ...); columns may have different numbers of rows
Labels = Sequence[Any]  # true answer of each image, of the task's own type; str(answer) holds all of it
Colour = tuple[int, int, int]  # red, green, blue, 0..255
SELECTION = "selection"  # path of the module that makes answers of a network's maps, in an exported model
NOTHING = 0.01  # main figure below which a network is said to have found nothing


@dataclass(frozen=True)
class Prediction:
    """Predicted class of an image. score: probability, 0..1."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class Detection(Prediction):
    """Detected object. box: x1, y1, x2, y2 in pixels of the upright original image, from its left and top edge.

    mask: pixels of the object, of networks that give masks.
    """

    box: tuple[float, float, float, float]
    mask: DetectedMask | None = field(default=None, compare=False, repr=False)


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
    network's input; None leaves boxes and label maps in pixels of that input, without masks. selection: that of a
    detector. classes: number of classes of the network, 0 if unknown. palette: colour of each class as red, green,
    blue; None without.
    """

    labels: Sequence[str] | None = None
    top: int = 5
    places: Sequence[Geometry] | None = None
    selection: SelectionSettings = DEFAULT_SELECTION
    classes: int = 0
    palette: Sequence[Colour] | None = None


AS_THEY_ARE = Reading()


Decode = Callable[[Outputs, Reading], Sequence[Sequence[Prediction]]]


class Align(Protocol):
    """Type of `Task.align`."""

    def __call__(self, expected: Outputs, actual: Outputs, tolerance: float = ...) -> tuple[Outputs, Outputs, float]:
        """Pair the rows of two runs on the same images."""
        ...


def means(rows: Rows) -> dict[str, float]:
    """Return the mean of each column. Sums are exact: the order of the rows does not change a digit."""
    return {name: math.fsum(values) / len(values) for name, values in rows.items()}


@dataclass(frozen=True)
class Measure:
    """Figures of any number of images, by way of rows that add up.

    `rows(outputs, wanted, reading)`: return the rows of some images, one or more for each image. wanted: what the
    outputs are compared with. The rows of all images are those of their parts, concatenated by column.
    `reduce(rows)`: return the figures of the images of these rows, by name. The order of the rows does not matter.
    """

    rows: Callable[[Outputs, Any, Reading], Rows]
    reduce: Callable[[Rows], dict[str, float]] = means


@dataclass(frozen=True, kw_only=True)
class Score(Measure):
    """Scores of a task against labels: figures from 0 to 1, larger is better. `rows` gets the Labels of the images.

    titles: names of the figures that people are shown, the main one first: limits of accuracy apply to it. Further
    figures are in manifests and records alone.
    `read(source, names, count)`: list the labelled images of a file or folder, and return a sentence on how classes got
    their index. names: class names of the network, None without; count: number of its classes. Raises CalibrationError.
    `by_chance(figure, images, classes)`: whether a network without any skill could reach this main figure on so many
    images.
    """

    titles: Mapping[str, str]
    read: Callable[[Path, Sequence[str] | None, int], tuple[Sequence[ImageItem], str]]
    by_chance: Callable[[float, int, int], bool] = lambda figure, images, classes: figure < NOTHING

    @property
    def metric(self) -> str:
        """Name of the main figure."""
        return next(iter(self.titles))


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
    `agree(expected, actual)`: return the share of the answers that are the same, for each image, (images,) float64.
    `align(expected, actual, tolerance)`: pair the rows of outputs whose order may differ and that agree within the
    tolerance. Returns the paired rows of both by name, and the share of rows that have a pair. None: outputs are
    compared as they are.
    `draw(image, predictions, least)`: return a copy of an upright image with the predictions from the score `least` on.
    score: accuracy against labels. compare: difference from the float network's outputs, of outputs without an answer.
    selects: whether the exported model ends with the module SELECTION, which makes answers of the network's own maps
    for one size of the input; `decode` maps the answers back to the image with `Reading.places`. Answers are no measure
    of noise: a small error moves one or changes nothing.
    """

    name: str
    heads: tuple[str, ...]
    gives: str
    check: Callable[[Mapping[str, Spec], Sequence[str] | None], tuple[str, str] | None] | None = None
    decode: Decode | None = None
    agree: Callable[[Outputs, Outputs], NDArray[np.float64]] | None = None
    align: Align | None = None
    draw: Callable[[Image, Any, float], Image] | None = None
    score: Score | None = None
    compare: Measure | None = None
    selects: bool = False

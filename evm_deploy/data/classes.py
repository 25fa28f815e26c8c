"""Images with a class each: list them, and give the classes their index in the order of the head."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evm_deploy._util.text import some_of
from evm_deploy.data.sources import ImageItem, named_images, numbered_images
from evm_deploy.errors import CalibrationError

LISTED = 4  # classes that the sentence on the order lists


def read_labels(source: Path, labels: Sequence[str] | None, num_classes: int) -> tuple[list[ImageItem], str]:
    """List the images of `source`, each with its class index, and return a sentence on how it was found.

    source: a folder with one folder per class; a list with `path,class` (.csv) or `path class` (text) lines, in which
    the folder of each path is its class if no line names one; or an .npz with `images` (uint8) and `labels` (integers).
    A class is given by its name in `labels` or by its index. Without `labels`, other names are numbered in alphabetical
    order, if there are as many names as classes. A head of one class has two: 0 is absent, 1 is present. Raises
    CalibrationError if the classes do not fit the head.
    """
    if source.suffix.lower() == ".npz":
        return numbered_images(source, max(num_classes, 2)), ""
    if source.suffix.lower() == ".json":
        raise CalibrationError(
            f"{source} is JSON, as of boxes: a classifier's images have one class each",
            "give class folders, a list of path,class lines, or an .npz with images and labels",
        )
    named = named_images(source)
    index, order = class_index(source, sorted({name for _, name in named}), num_classes, labels)
    return [replace(item, label=index[name]) for item, name in named], order


def class_index(
    source: Path, names: list[str], num_classes: int, labels: Sequence[str] | None
) -> tuple[dict[str, int], str]:
    """Return the class index of each of `names`, and a sentence on how it was found. Raises CalibrationError."""
    known: dict[str, list[int]] = {}
    for index, label in enumerate(labels or ()):
        known.setdefault(_composed(label), []).append(index)
    if num_classes == 1:  # absent or present; the label names what is present
        num_classes, absent = 2, [_composed(name) for name in names if _composed(name) not in known]
        if len(absent) < min(2, len(names)):
            known = {**{name: [0] for name in absent}, **{label: [1] for label in known}}
    unknown = [name for name in names if _composed(name) not in known]
    by_number = all(re.fullmatch("[0-9]{1,9}", name) and int(name) < num_classes for name in names)
    begin = f"classes of {source.name} got their index"
    if known and not unknown:
        twice = next((name for name in names if len(known[_composed(name)]) > 1), None)
        if twice:
            places = " and ".join(map(str, known[_composed(twice)]))
            raise CalibrationError(
                f"{source}: class {twice} is ambiguous: the labels {places} have this name", "name its class by index"
            )
        return {name: known[_composed(name)][0] for name in names}, f"{begin} by name, from the labels"
    if by_number and len(unknown) == len(names):
        moved = [f"{name} class {place}" for place, name in enumerate(names) if int(name) != place]
        other = f"; the alphabet, as in torchvision's ImageFolder, would make {moved[0]}" if moved else ""
        differs = other if len(names) == num_classes else ""
        return {name: int(name) for name in names}, f"{begin} by number{differs}"
    if len(names) == num_classes and not known:
        shown = [f"{name} is {index}" for index, name in enumerate(names)]
        listed = ", ".join(shown if len(shown) <= LISTED else [*shown[: LISTED - 1], "..", shown[-1]])
        return {name: index for index, name in enumerate(names)}, f"{begin} in alphabetical order: {listed}"
    if len(names) > num_classes or not known:
        raise CalibrationError(
            f"{source} has {len(names)} classes ({some_of(unknown)}), the head has {num_classes}",
            "name the classes as in --labels, or by index from 0",
        )
    unused = [label for label in labels or () if label not in names]
    near = difflib.get_close_matches(unknown[0], unused, 1)
    raise CalibrationError(
        f"{source}: {len(unknown)} of {len(names)} classes are not among the labels ({some_of(unknown)}); "
        f"labels without images: {some_of(unused) or 'none'}",
        f"did you mean {near[0]}?" if near else "name the classes as in --labels, or all of them by index from 0",
    )


def _composed(name: str) -> str:
    """Return a name with composed letters: macOS may write those of files apart."""
    return unicodedata.normalize("NFC", name)

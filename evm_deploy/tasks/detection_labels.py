"""Labelled images for detection: COCO's JSON, and folders of PASCAL VOC annotations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from evm_deploy.data.masks import RunMask
from evm_deploy.data.sources import ImageItem
from evm_deploy.errors import CalibrationError
from evm_deploy.tasks.average_precision import Objects, listed

MAX_BYTES = 1 << 30  # of a COCO file; that of train2017 has 469 MB
MAX_XML_BYTES = 4 << 20
FOLDERS = ("JPEGImages", "images", "Images", ".")  # beside the annotations, where images are looked for
ANNOTATIONS = ("Annotations", "annotations", ".")


def read_labels(
    source: Path, names: Sequence[str] | None, count: int, *, masks: bool = False
) -> tuple[list[ImageItem], str]:
    """List images with their `Objects`, of a COCO JSON file or a folder of VOC's XML files.

    names: class names of the network, in order; count: number of its classes. A category gets the index of its name.
    Without names, COCO's categories are numbered by rising id and VOC's by name, if there are `count` of them; the
    second value says so. Images of a COCO file are looked for beside it, in a folder named as the file without
    `instances_`, in `images`, and one folder up. Boxes are in pixels of the upright image. masks: whether to read the
    masks of the objects, too. Raises CalibrationError for a damaged file, unknown categories, images that are not
    there, data without any object, and masks of VOC, which has none for single objects.
    """
    if source.is_dir() and masks:
        raise CalibrationError(f"{source} has VOC annotations, without masks of objects", "give a COCO JSON file")
    if not source.exists():
        raise CalibrationError(f"{source} does not exist", "give a COCO JSON file, or a folder of VOC annotations")
    items, by = _read_voc(source, names, count) if source.is_dir() else _read_coco(source, names, count, masks)
    if not any(len(item.label.counting) for item in items):
        raise CalibrationError(
            f"{source}: no image has an object to find", "crowds and difficult objects alone give no average precision"
        )
    items = [replace(item, label=replace(item.label, number=i)) for i, item in enumerate(items)]
    return items, f"categories of {source.name} got their index {by if names is None else 'by name, from the labels'}"


def _read_coco(source: Path, names: Sequence[str] | None, count: int, masks: bool) -> tuple[list[ImageItem], str]:
    try:
        if source.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        content = json.loads(source.read_text(encoding="utf-8-sig"))
        categories = {each["id"]: str(each["name"]) for each in content["categories"]}
        images = {each["id"]: str(each["file_name"]) for each in content["images"]}
        rows: dict[Any, list[Mapping[str, Any]]] = {key: [] for key in images}
        for row in content["annotations"]:
            rows[row["image_id"]].append(row)
        index = _index(source, [categories[key] for key in sorted(categories)], names, count)
        objects = {key: _coco_objects(each, categories, index) for key, each in rows.items()}
        if masks:
            sizes = {each["id"]: _coco_size(each) for each in content["images"]}
            objects = {key: replace(objects[key], masks=_coco_masks(each, sizes[key])) for key, each in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CalibrationError(
            f"{source} is not a COCO file of boxes: {why}",
            "a COCO file has the lists images, categories, and annotations with bbox, category_id and image_id",
        ) from error
    split = re.sub(r"^(instances|person_keypoints)_", "", source.stem)
    places = [base / part for base in (source.parent, source.parent.parent) for part in (".", split, "images")]
    order = sorted(images, key=lambda key: (0, key, "") if isinstance(key, int) else (1, 0, str(key)))
    items = [ImageItem(images[key], _image_path(source, images[key], places), objects[key]) for key in order]
    return items, "by rising id"


def _coco_objects(
    rows: Sequence[Mapping[str, Any]], categories: Mapping[Any, str], index: Mapping[str, int]
) -> Objects:
    """Return the objects of one image. Boxes are x, y, width, height. Raises KeyError, ValueError."""
    boxes = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise ValueError("a bbox is not finite")
    boxes[:, 2:] += boxes[:, :2]
    labels = np.array([index[categories[row["category_id"]]] for row in rows], np.int64)
    crowd = np.array([bool(row.get("iscrowd", 0)) for row in rows], bool)
    return Objects(boxes, labels, np.zeros(len(rows), bool), crowd)


def _coco_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size (H, W) of an image in a COCO file. Raises KeyError, ValueError."""
    height, width = image["height"], image["width"]
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) >= 1):
        raise ValueError("the height or width of an image is no number over 0")
    return height, width


def _coco_masks(rows: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> NDArray[np.object_]:
    """Return the masks of the objects of one image. Raises KeyError, ValueError."""
    return listed([RunMask.from_coco(row["segmentation"], size) for row in rows])


def _read_voc(source: Path, names: Sequence[str] | None, count: int) -> tuple[list[ImageItem], str]:
    found = next((source / name for name in ANNOTATIONS if any((source / name).glob("*.xml"))), None)
    if not found:
        files = sorted(source.glob("*.json"))
        raise CalibrationError(
            f"{source} has no VOC annotations (*.xml), and is no COCO file",
            f"give the COCO file:  {files[0]}"
            if len(files) == 1
            else "give a COCO JSON file, or a folder with Annotations/*.xml and JPEGImages",
        )
    files = sorted(found.glob("*.xml"))
    trees = [_parse(path) for path in files]
    rows = [tree.findall("object") for tree in trees]
    every = sorted({_text(path, row, "name") for path, each in zip(files, rows, strict=True) for row in each})
    index = _index(source, every, names, count)
    items = []
    for path, tree, each in zip(files, trees, rows, strict=True):
        boxes = np.array([_voc_box(path, row) for row in each], np.float64).reshape(-1, 4)
        labels = np.array([index[_text(path, row, "name")] for row in each], np.int64)
        difficult = np.array([row.findtext("difficult", "0").strip() == "1" for row in each], bool)
        name = tree.findtext("filename", "").strip() or f"{path.stem}.jpg"
        places = [base / folder for base in (source, found.parent) for folder in FOLDERS]
        image = _image_path(path, name, places)
        items.append(ImageItem(name, image, Objects(boxes, labels, difficult, np.zeros(len(each), bool))))
    return items, "by name, in alphabetical order"


def _parse(path: Path) -> ElementTree.Element:
    """Parse a small XML file without a document type. Raises CalibrationError."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_XML_BYTES or b"<!DOCTYPE" in data or b"<!ENTITY" in data:
            raise ValueError("too large, or with a document type")
        return ElementTree.fromstring(data)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise CalibrationError(f"{path} is not a VOC annotation: {error}") from error


def _text(path: Path, row: ElementTree.Element, tag: str) -> str:
    found = row.findtext(tag)
    if found is None or not found.strip():
        raise CalibrationError(f"{path}: an object has no {tag}")
    return found.strip()


def _voc_box(path: Path, row: ElementTree.Element) -> tuple[float, float, float, float]:
    """Return the corners of an object. VOC counts pixels from 1, and its last pixel is inside the box."""
    box = row.find("bndbox")
    try:
        if box is None:
            raise ValueError("no bndbox")
        x1, y1, x2, y2 = (float(box.findtext(tag, "")) for tag in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise CalibrationError(f"{path}: an object has no box of four numbers") from error
    return x1 - 1, y1 - 1, x2, y2


def _index(source: Path, found: Sequence[str], names: Sequence[str] | None, count: int) -> dict[str, int]:
    """Return the class index of each category. Raises CalibrationError for one that the network does not have."""
    if names:
        index = {name: i for i, name in enumerate(names)}
        unknown = [name for name in found if name not in index]
        if unknown:
            raise CalibrationError(
                f"{source}: {len(unknown)} of {len(found)} categories are not among the network's classes: "
                f"{', '.join(unknown[:4])}",
                "name the classes as in the file with --labels",
            )
        return index
    if len(set(found)) != count:
        raise CalibrationError(
            f"{source} has {len(set(found))} categories, the network has {count} classes",
            "name the network's classes in order with --labels",
        )
    return {name: i for i, name in enumerate(found)}


def _image_path(source: Path, name: str, places: Sequence[Path]) -> Path:
    """Return the path of an image that a file of labels names. Raises CalibrationError if it is in none of `places`."""
    inside = PurePosixPath(name.replace("\\", "/"))
    if inside.is_absolute() or ".." in inside.parts:
        raise CalibrationError(f"{source}: the image {name!r:.120} is outside the folder of the data")
    for place in places:
        if (place / inside).is_file():
            return place / inside
    raise CalibrationError(
        f"{source}: the image {name!r:.120} is not found beside it", "put images and labels into the usual folders"
    )

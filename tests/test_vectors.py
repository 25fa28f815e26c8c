"""The vectors that every SDK is tested with, here in Python, which made them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evm_deploy.bundle.manifest import Manifest
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.data.geometry import Geometry
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.reading import read_image
from evm_deploy.errors import BundleError, ImageError
from evm_deploy.tasks.detection import decode, select
from evm_deploy.tasks.task import Reading
from tests.broken import changed_manifest

FOLDER = Path(__file__).parents[1] / "sdk" / "vectors"
CONTENT = json.loads((FOLDER / "cases.json").read_bytes())
CASES = {case["name"]: case for case in CONTENT["cases"]}


def preprocessing(case: dict) -> Preprocessing:
    return Preprocessing(**{key: tuple(v) if isinstance(v, list) else v for key, v in case["preprocessing"].items()})


def expected(case: dict) -> np.ndarray:
    """Return the expected pixels of a case, (H, W, channels) uint8."""
    pixels = np.asarray(Image.open(FOLDER / case["expected"]))
    return pixels.reshape(*pixels.shape[:2], -1)


@pytest.mark.parametrize("name", CASES)
def test_python_gives_the_vectors(name):
    case = CASES[name]
    path, spec = FOLDER / case["image"], preprocessing(case)
    assert read_image(path).size == (case["width"], case["height"])
    if "code" in case:
        with pytest.raises(ImageError) as raised:
            spec.pixels(path)
        assert raised.value.code == case["code"]
        return
    pixels = spec.pixels(path)
    want = expected(case)
    assert pixels.shape == want.shape
    assert np.abs(pixels.astype(int) - want).max() <= CONTENT["tolerance"]
    tensor = spec.normalise(want[None])[0]
    for c, y, x, value in case["normalised"]:
        assert tensor[c, y, x] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("case", CONTENT["manifests"], ids=lambda case: case["name"])
def test_python_refuses_the_manifests(case, demo_bundle, tmp_path):
    bundle = changed_manifest(demo_bundle.path, tmp_path / "bundle", case)
    with pytest.raises(BundleError) as raised:
        Manifest.read(bundle)
    assert (raised.value.code, raised.value.where) == (case["code"], case["where"])


def test_every_code_is_told():
    used = {case["code"] for key in ("cases", "manifests") for case in CONTENT[key] if "code" in case}
    assert used < set(CONTENT["codes"])
    page = (FOLDER.parents[1] / "docs" / "bundle.md").read_text(encoding="utf-8")
    assert [code for code in CONTENT["codes"] if f"`{code}`" not in page] == []


ALIKE = (
    {"square", "alpha", "transparent"},
    {"grey", "grey-alpha", "grey-16-bit"},
    {"exif-6", "exif-in-png"},
    {"fits", "stretch-fits", "pad-fits"},
)


def test_the_images_are_told_apart():
    """Orientation, size, interpolation matter: no case passes with the pixels of another, but where Python ignores what
    differs: alpha, bits, the file's format."""
    pixels = {n: expected(c).astype(int) for n, c in CASES.items() if "expected" in c}
    for one, other in itertools.combinations(pixels, 2):
        if not any({one, other} <= group for group in ALIKE) and pixels[one].shape == pixels[other].shape:
            assert np.abs(pixels[one] - pixels[other]).max() > CONTENT["tolerance"], f"{one} and {other}"


PREDICTIONS = FOLDER / "predictions.json"


def is_predicted(found: dict[str, Any]) -> None:
    """Check what an SDK decoded of predictions.json: boxes within rounding, labels and label maps equal."""
    want = json.loads(PREDICTIONS.read_bytes())
    for case, have in zip(want["detections"], found["detections"], strict=True):
        assert (have["resized"], have["offset"]) == (case["resized"], case["offset"]), case["name"]
        assert have["labels"] == case["labels"] and have["scores"] == case["scores"], case["name"]
        shape = (len(case["labels"]), 4)
        off = np.abs(np.reshape(have["boxes"], shape) - np.reshape(case["boxes"], shape)).max(initial=0)
        assert off < 1e-9, case["name"]
    assert found["label_maps"] == [case["expected"] for case in want["label_maps"]]


def place_of(case: dict[str, Any]) -> Geometry:
    height, width = case["image"]
    return preprocessing(case).geometry(width, height)


def test_python_gives_the_predictions():
    content = json.loads(PREDICTIONS.read_bytes())
    dtypes = {"boxes": np.float32, "scores": np.float32, "labels": np.int32, "count": np.int32}
    detected, maps = [], []
    for case in content["detections"]:
        outputs = {name: np.array([value], dtypes[name]) for name, value in case["outputs"].items()}
        place = place_of(case)
        (found,) = select(outputs, SelectionSettings(iou=case["iou"], max_det=case["max_det"]), [place])
        values = {name: getattr(found, name).tolist() for name in ("boxes", "scores", "labels")}
        detected.append({"resized": [*place.resized], "offset": [*place.offset], **values})
    for case in content["label_maps"]:
        found = place_of(case).map_to_image(np.array(case["map"], case["dtype"]))
        assert found.dtype == case["dtype"] and found.shape == tuple(case["image"])
        maps.append(found.tolist())
    is_predicted({"detections": detected, "label_maps": maps})


def test_a_label_map_that_is_cut_off_goes_on_at_its_edge():
    """The pixels are those of to_network, where the network sees the image at all."""
    (case,) = (each for each in json.loads(PREDICTIONS.read_bytes())["label_maps"] if each["name"] == "crop")
    place = place_of(case)
    top, left, bottom, right = place.content
    for y, x in itertools.product(range(case["image"][0]), range(case["image"][1])):
        at_x, at_y = np.floor(place.to_network(np.array([x + 0.5, y + 0.5]))).astype(int)
        inside = case["map"][min(max(at_y, top), bottom - 1)][min(max(at_x, left), right - 1)]
        assert case["expected"][y][x] == inside


def test_a_class_without_a_name_has_its_number():
    """A bundle with too few lines in labels.txt: no index is out of range."""
    outputs = {"boxes": np.float32([[[0, 0, 9, 9]] * 2]), "scores": np.float32([[0.9, 0.8]])}
    outputs |= {"labels": np.int32([[1, 0]]), "count": np.int32([2])}
    assert [each.label for each in decode(outputs, Reading(["only"]))[0]] == ["class 1", "only"]

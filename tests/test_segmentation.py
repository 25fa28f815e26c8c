"""The task segmentation: checks, the way back to the image, mIoU, agreement, labelled data, drawing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evm_deploy.data.geometry import Geometry
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import CalibrationError, UsageError
from evm_deploy.tasks import drawing, segmentation
from evm_deploy.tasks.mean_iou import class_iou, mean_iou, pixel_counts
from evm_deploy.tasks.segmentation_labels import read_masks
from evm_deploy.tasks.task import LabelMap, Reading

NAMES = ("wall", "дорога", "🦆")


def spec(dtype="uint8", shape=(1, 4, 6)):
    return SimpleNamespace(dtype=dtype, shape=shape)


def test_outputs_of_a_segmenter():
    assert segmentation.check({"label_map": spec()}, None) is None
    assert segmentation.check({"label_map": spec("int32", (None, 4, 6))}, None) is None
    for wrong in (
        {"logits": spec()},
        {"label_map": spec(), "more": spec()},
        {"label_map": spec("float32")},
        {"label_map": spec(shape=(1, 4))},
        {"label_map": spec(shape=(1, 0, 6))},
    ):
        assert segmentation.check(wrong, None)


@pytest.mark.parametrize("original", [(1, 1), (7, 5), (3000, 4000), (50, 3), (100, 101)])
@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_a_map_goes_back_to_the_image(original, resize):
    """A map that tells its own position: every pixel of the image reads the pixel of the input over its centre."""
    place = Preprocessing((60, 80), resize=resize).geometry(original[1], original[0])
    rows, columns = np.mgrid[0:60, 0:80].astype(np.int32)
    for own, axis in ((rows, 0), (columns, 1)):
        found = place.map_to_image(own)
        assert found.shape == original
        centre = (np.arange(original[axis]) + 0.5) * place.resized[axis] / original[axis]
        want = np.minimum(np.floor(centre), place.resized[axis] - 1)
        assert (found == (want[:, None] if axis == 0 else want[None])).all()
    (answer,) = segmentation.decode({"label_map": np.zeros((1, 60, 80), np.uint8)}, Reading(places=[place]))
    assert answer.map.shape == original


def test_without_places_a_map_stays_in_the_input():
    maps = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    first, second = segmentation.decode({"label_map": maps}, Reading(NAMES, palette=[(1, 2, 3)]))
    assert (first.map == maps[0]).all() and (second.map == maps[1]).all()
    assert first.palette == [(1, 2, 3)] and [each.label for each in first][:4] == [*NAMES, "class 3"]


def test_a_label_map_is_a_sequence_of_the_classes_that_are_present():
    found = LabelMap(np.array([[2, 2, 0], [2, 9, 2]], np.int32), NAMES)
    assert [(each.label, each.index, each.score) for each in found] == [
        ("🦆", 2, pytest.approx(4 / 6)),
        ("wall", 0, pytest.approx(1 / 6)),
        ("class 9", 9, pytest.approx(1 / 6)),
    ]
    assert len(found) == 3 and found[-1].index == 9 and len(found[:2]) == 2
    damaged = LabelMap(np.array([[-5, 2**31 - 1]], np.int32), NAMES)
    assert [each.label for each in damaged] == ["class -5", "class 2147483647"]


# --------------------------------------------------------------------------------------------------------------- mIoU


def test_mean_iou_by_hand():
    """Class 0: 1 of 3; class 1: 2 of 4 (one pixel is predicted 0, one is truly 2); class 2: 0 of 1; 3 never occurs."""
    truth = np.array([[0, 1, 1], [1, 2, 255]])
    found = np.array([[0, 1, 0], [1, 1, 7]])
    rows = pixel_counts(found, truth, 4)
    assert class_iou(rows)[:3].tolist() == [0.5, 0.5, 0] and np.isnan(class_iou(rows)[3])
    assert mean_iou(rows) == {"mIoU": pytest.approx(1 / 3), "pixel_accuracy": 3 / 5}
    nothing = pixel_counts(found, np.full((2, 3), 255), 4)
    assert all(np.isnan(value) for value in mean_iou(nothing).values())
    with pytest.raises(ValueError, match="true one"):
        pixel_counts(found, truth.T, 4)


def test_rows_of_images_add_up_in_any_order():
    rng = np.random.default_rng(3)
    truths = [rng.integers(0, 6, (9, 5 + i)) for i in range(4)]
    found = [LabelMap(np.where(rng.random(t.shape) < 0.7, t, rng.integers(0, 6, t.shape))) for t in truths]
    parts = [pixel_counts(each.map, truth, 5, ignored=5) for each, truth in zip(found, truths, strict=True)]
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert rows["true"].shape == (4, 5)
    whole = {name: value.sum(0, keepdims=True) for name, value in rows.items()}
    assert mean_iou(rows) == mean_iou(whole) == mean_iou({name: value[::-1] for name, value in rows.items()})
    confusion = np.zeros((6, 6))
    for each, truth in zip(found, truths, strict=True):
        np.add.at(confusion, (truth.ravel(), each.map.ravel()), 1)
    confusion = confusion[:5]
    right = np.diag(confusion)
    want = right / (confusion.sum(1) + confusion.sum(0)[:5] - right)
    assert mean_iou(rows)["mIoU"] == pytest.approx(want.mean())
    assert mean_iou(rows)["pixel_accuracy"] == pytest.approx(right.sum() / confusion.sum())


def test_agreement_is_the_share_of_equal_pixels():
    maps = np.zeros((2, 4, 5), np.uint8)
    other = maps.astype(np.int32)
    other[1, 0, :2] = 3
    expected, actual = {"label_map": maps}, {"label_map": other}
    assert segmentation.agree(expected, actual).tolist() == [1, 0.9]
    ours, theirs, share = segmentation.align(expected, actual)
    assert share == pytest.approx(0.95) and len(ours["label_map"]) == len(theirs["label_map"]) == 38


# ------------------------------------------------------------------------------------------------------ labelled data


def written(folder, names, images="images", masks="annotations", value=1):
    for name in names:
        for kind, path in ((images, f"{name}.jpg"), (masks, f"{name}.png")):
            file = folder / kind / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 8), value, np.uint8)).save(file)
    return folder


@pytest.mark.parametrize(
    ("images", "masks"), [("images", "annotations"), ("img_dir", "ann_dir"), ("JPEGImages", "SegmentationClass")]
)
def test_layouts_of_labelled_data(images, masks, tmp_path):
    written(tmp_path, ("validation/b", "validation/a"), images, masks)
    for source in (tmp_path, tmp_path / images, tmp_path / images / "validation"):
        found, order = read_masks(source, None, 3)
        assert [Path(each.source).stem for each in found] == ["a", "b"] and "0 is the first class" in order
        assert (found[0].label.read() == 1).all() and found[0].label.read().shape == (6, 8)


def test_scores_of_masks(tmp_path):
    written(tmp_path, ("a", "b"), value=2)
    (first, second), _ = read_masks(tmp_path, None, 4)
    maps = np.stack([np.full((6, 8), 2, np.uint8), np.zeros((6, 8), np.uint8)])
    rows = segmentation.score({"label_map": maps}, [first.label, second.label], Reading(classes=4))
    assert mean_iou(rows) == {"mIoU": 0.25, "pixel_accuracy": 0.5}
    with pytest.raises(CalibrationError, match=r"a\.png and its image have different sizes: 8x6 and 8x5"):
        segmentation.score({"label_map": maps[:1, :5]}, [first.label], Reading(classes=4))
    text = str(first.label)
    Image.fromarray(np.full((6, 8), 1, np.uint8)).save(first.label.path)
    assert str(first.label) != text  # kept results are those of the file's content


def test_masks_count_as_the_data_set_says(tmp_path):
    values = np.array([[0, 1, 3, 255]], np.uint8)
    written(tmp_path, ("a",))
    mask = Image.fromarray(values, "P")
    mask.putpalette(list(range(256)) * 3)
    mask.save(tmp_path / "annotations" / "a.png")
    (whole,), _ = read_masks(tmp_path, None, 4)
    assert whole.label.read().tolist() == [[0, 1, 3, 255]]
    (reduced,), order = read_masks(tmp_path, None, 3)
    assert reduced.label.read().tolist() == [[255, 0, 2, 255]]
    assert order.endswith("from the masks: 3 occurs, so 1 is the first class and 0 does not count")
    with pytest.raises(CalibrationError, match="has the classes 3, the network has 0 to 1"):
        read_masks(tmp_path, None, 2)
    Image.fromarray(values.astype(np.uint16) + 400).save(tmp_path / "annotations" / "a.png")
    (large,), _ = read_masks(tmp_path, None, 700)
    assert large.label.read().tolist() == [[400, 401, 403, 655]]


def test_what_is_no_labelled_data(tmp_path):
    written(tmp_path / "a", ("training/a", "validation/a"))
    with pytest.raises(CalibrationError, match="several splits: training, validation"):
        read_masks(tmp_path / "a", None, 2)
    written(tmp_path / "b", ("a", "b"))
    (tmp_path / "b" / "annotations" / "b.png").unlink()
    with pytest.raises(CalibrationError, match=r"1 of 2 images .* have no mask"):
        read_masks(tmp_path / "b", None, 2)
    with pytest.raises(CalibrationError, match="no folder of masks"):
        read_masks(tmp_path / "b" / "annotations", None, 2)
    with pytest.raises(CalibrationError, match="is not a folder"):
        read_masks(tmp_path / "nowhere", None, 2)
    mask = tmp_path / "b" / "annotations" / "a.png"
    for content, message in ((b"no image", "cannot be read"), (b"", "cannot be read")):
        mask.write_bytes(content)
        (tmp_path / "b" / "images" / "b.jpg").unlink(missing_ok=True)
        with pytest.raises(CalibrationError, match=message):
            read_masks(tmp_path / "b", None, 2)
    Image.new("RGB", (8, 6)).save(mask)
    with pytest.raises(CalibrationError, match="is a colour image"):
        read_masks(tmp_path / "b", None, 2)


# ------------------------------------------------------------------------------------------------------------ drawing


def test_a_label_map_is_drawn_half_transparent_with_a_legend():
    image = Image.new("RGB", (200, 160), (100, 100, 100))
    values = np.zeros((160, 200), np.uint8)
    values[80:, 100:] = 1
    found = LabelMap(values, ("road", "sky"), [(0, 0, 0), (200, 0, 100)])
    drawn = drawing.draw_label_map(image, found)
    assert drawn.size == image.size
    assert drawn.getpixel((150, 120)) == (150, 50, 100) and drawn.getpixel((50, 150)) == (50, 50, 50)
    assert drawn.getpixel((0, 0)) == (0, 0, 0), "the legend's tag for road"
    first = drawing.LEAST_TEXT
    tags = [drawn.getpixel((0, y)) for y in range(3 * first)]
    assert (200, 0, 100) in tags and tags[-1] == (50, 50, 50)
    assert drawing.draw_label_map(image, found, 0.5).getpixel((0, 15)) == (50, 50, 50), "sky has too small a share"
    other = drawing.draw_label_map(image, LabelMap(values, None))
    assert other.getpixel((150, 120)) == tuple((100 + part) // 2 for part in drawing.PALETTE[1])


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (30, 12), (12, 400)])
def test_names_of_any_script_and_images_of_any_size(size):
    values = np.arange(size[0] * size[1], dtype=np.int32).reshape(size[1], size[0]) % 40
    labels = ("wall", "道路", "حديقة", "🦆") * 10
    drawn = drawing.draw_label_map(Image.new("L", size), LabelMap(values, labels))
    assert drawn.size == size and drawn.mode == "RGB"


def test_a_map_of_another_size_is_not_drawn():
    with pytest.raises(UsageError, match="the label map is 4x3, the image 5x3"):
        drawing.draw_label_map(Image.new("RGB", (5, 3)), LabelMap(np.zeros((3, 4), np.uint8)))


def test_padding_is_never_read():
    place = Geometry((10, 10), (7, 7), (9, 12), (0, 0))
    values = np.full((9, 12), 9, np.uint8)
    values[:7, :7] = 1
    assert (place.map_to_image(values) == 1).all()

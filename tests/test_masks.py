"""Masks: run lengths and polygons against pycocotools, pasting, mask AP, labelled masks, drawing."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from evm_deploy.data.geometry import Geometry
from evm_deploy.data.masks import DetectedMask, RunMask, mask_overlaps
from evm_deploy.errors import CalibrationError
from evm_deploy.tasks import detection, drawing
from evm_deploy.tasks.average_precision import Found, Objects, average_precision, listed
from evm_deploy.tasks.detection_labels import read_labels
from evm_deploy.tasks.task import Detection, Reading
from tests.toolchains import need


def polygons(seed, count):
    """Polygons of many kinds around an image: real, whole and rounded coordinates, convex and crossing themselves."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        corners = int(rng.integers(3, 12))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        kinds = (
            rng.uniform(-10, 90, (corners, 2)),
            rng.integers(0, 80, (corners, 2)).astype(float),
            np.stack([40 + 25 * np.cos(angle), 30 + 25 * np.sin(angle)], 1),
            np.round(rng.uniform(0, 80, (corners, 2)), 2),
        )
        points = kinds[i % 4]
        parts = [points, points[:3] + rng.uniform(-9, 9, (3, 2))][: 1 + i % 2]
        yield [each.ravel().tolist() for each in parts], tuple(int(side) for side in rng.integers(1, 90, 2))


def test_polygons_and_run_lengths_are_those_of_pycocotools():
    need("pycocotools")
    from pycocotools import mask as coco

    for parts, size in polygons(0, 400):
        want = coco.decode(coco.merge(coco.frPyObjects(parts, *size)))
        got = RunMask.from_coco(parts, size)
        assert np.array_equal(got.array(), want)
        assert got.area == want.sum()
        text = got.to_coco()
        assert text["counts"].encode() == coco.encode(np.asfortranarray(want))["counts"]
        assert np.array_equal(coco.decode(text), want)
        assert np.array_equal(RunMask.of(want).edges, got.edges)
        assert np.array_equal(RunMask.from_coco(text, size).edges, got.edges)


@pytest.mark.parametrize("bitmap", [np.zeros((3, 4)), np.ones((3, 4)), np.eye(5), np.ones((1, 1)), np.tri(4, 7)])
def test_run_lengths_there_and_back(bitmap):
    mask = RunMask.of(bitmap)
    assert np.array_equal(mask.array(), bitmap.astype(bool)) and mask.area == bitmap.sum()
    text = mask.to_coco()
    assert np.array_equal(RunMask.from_coco(json.loads(json.dumps(text)), bitmap.shape).array(), bitmap.astype(bool))
    lengths = np.diff(np.concatenate([[0], mask.edges, [bitmap.size]])).tolist()
    assert np.array_equal(RunMask.from_coco({**text, "counts": lengths}, bitmap.shape).edges, mask.edges)
    placed = RunMask.of(bitmap, (2, 3), (20, 30)).array()
    assert placed.sum() == bitmap.sum() and np.array_equal(placed[2 : 2 + len(bitmap), 3 : 3 + bitmap.shape[1]], bitmap)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "no polygons"),
        (None, "no polygons"),
        ([[1, 2, 3, 4]], "at least 3 points"),
        ([[0, 0, 1e9, 0, 5, 5]], "near the image"),
        ([[0, 0, float("nan"), 0, 5, 5]], "near the image"),
        ([{"a": 1}], "odd values"),
        ({"counts": [12]}, "has the size None"),
        ({"counts": [12], "size": [4, 3]}, r"has the size \[4, 3\], its image \[3, 4\]"),
        ({"counts": [11], "size": [3, 4]}, "do not fill its image"),
        ({"counts": [13, -1], "size": [3, 4]}, "do not fill its image"),
        ({"counts": [2**62, 2**62, 2**62, 2**62, 12], "size": [3, 4]}, "do not fill its image"),
        ({"counts": [10**30], "size": [3, 4]}, "odd values"),
        ({"counts": "", "size": [3, 4]}, "no run lengths"),
        ({"counts": "<o", "size": [3, 4]}, "damaged"),
        ({"counts": "\x01", "size": [3, 4]}, "damaged"),
        ({"counts": "o" * 50 + "0", "size": [3, 4]}, "damaged"),
        ({"counts": "é", "size": [3, 4]}, "fill its image"),
    ],
)
def test_damaged_segmentations_are_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        RunMask.from_coco(segmentation, (3, 4))


def test_overlaps_of_masks():
    left, right, nothing = (np.zeros((6, 8), bool) for _ in range(3))
    left[:, :4], right[2:5, 3:6] = True, True
    masks = [RunMask.of(each) for each in (left, right, nothing)]
    shares = mask_overlaps(masks, masks, np.array([False, False, True]))
    assert shares == pytest.approx(np.array([[1, 3 / 30, 0], [3 / 30, 1, 0], [0, 0, 0]]))
    assert mask_overlaps(masks[:2], masks[:1], np.array([True]))[1, 0] == pytest.approx(3 / 9)
    assert mask_overlaps([], masks, np.zeros(3, bool)).shape == (0, 3)


# ------------------------------------------------------------------------------------------------------------ pasting


def test_a_mask_is_pasted_where_its_box_is():
    half = np.zeros((28, 28), np.float32)
    half[:, :14] = 1
    mask = DetectedMask(half, (10.0, 20.0, 30.0, 40.0), (50, 60))
    want = np.zeros((50, 60), bool)
    want[20:40, 10:20] = True
    assert np.array_equal(mask.array(), want)
    bitmap, place = mask.crop()
    assert bitmap.shape == (20, 20) and place == (20, 10)
    assert np.array_equal(mask.runs().array(), want)
    assert np.array_equal(RunMask.from_coco(mask.to_coco(), (50, 60)).array(), want)


@pytest.mark.parametrize(
    "box", [(-30, -20, 90, 70), (0.2, 0.3, 0.4, 0.6), (-9, -9, -2, -2), (5, 5, 5, 5), (59.7, 0, 70, 50)]
)
def test_boxes_at_the_edge_and_beyond(box):
    mask = DetectedMask(np.ones((28, 28), np.float32), tuple(map(float, box)), (50, 60))
    y, x = np.mgrid[0:50, 0:60] + 0.5
    inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
    assert np.array_equal(mask.array(), inside)
    assert RunMask.from_coco(mask.to_coco(), (50, 60)).area == inside.sum()


def test_the_memory_of_pasting_is_that_of_the_bitmap():
    mask = DetectedMask(np.ones((28, 28), np.float32), (1.0, 1.0, 3999.0, 2999.0), (3000, 4000))
    tracemalloc.start()
    bitmap, _ = mask.crop()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bitmap.sum() > 11.9e6
    assert peak < 12e6 + 16e6  # a band of probabilities beside the bitmap; all of them would be 48 MB


def test_masks_belong_to_the_whole_region_of_a_clipped_box():
    """The box ends in the padding: it is clipped to the image, its mask is not squeezed."""
    outputs = {
        "boxes": np.array([[[10, 10, 50, 50], [0, 0, 0, 0]]], np.float32),
        "scores": np.array([[0.9, 0]], np.float32),
        "labels": np.array([[1, -1]], np.int32),
        "count": np.array([1], np.int32),
        "masks": np.zeros((1, 2, 28, 28), np.float32),
    }
    outputs["masks"][0, 0, 14:] = 1
    place = Geometry((80, 60), (40, 30), (64, 64), (0, 0))
    ((found,),) = detection.decode(outputs, Reading(places=[place]))
    assert found.box == (20, 20, 60, 80) and found.mask.box == (20, 20, 100, 100)
    want = np.zeros((80, 60), bool)
    want[60:80, 20:60] = True
    assert np.array_equal(found.mask.array()[:, 22:], want[:, 22:])  # corners are rounded
    ((plain,),) = detection.decode(outputs, Reading())
    assert plain.mask is None and plain == Detection("class 1", 1, plain.score, (10, 10, 50, 50))
    pairs = detection.align(outputs, {**outputs, "masks": outputs["masks"] + 0.25})
    assert pairs[2] == 1 and pairs[0]["masks"].shape == (1, 28, 28)
    assert np.abs(pairs[1]["masks"] - pairs[0]["masks"]).max() == 0.25


# ------------------------------------------------------------------------------------------------------------ mask AP


def scenes(seed, images=8, size=(60, 80)):
    """True masks, and detections near them and far from them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[0], 0 : size[1]]

    def blob(centre, radius):
        return RunMask.of(((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 < 1)

    found, truths = [], []
    for _ in range(images):
        count = int(rng.integers(1, 7))
        centres, radii = rng.uniform(5, 60, (count, 2)), rng.uniform(4, 20, (count, 2))
        labels = rng.integers(0, 3, count)
        crowd = rng.random(count) < 0.2
        masks = listed([blob(*each) for each in zip(centres, radii, strict=True)])
        truths.append(Objects(np.zeros((count, 4)), labels, np.zeros(count, bool), crowd, len(truths), masks))
        near = np.repeat(np.arange(count), rng.integers(0, 3, count))
        moved = [blob(centres[i] + rng.normal(0, 2, 2), radii[i] * rng.uniform(0.8, 1.2, 2)) for i in near]
        far = [blob(rng.uniform(0, 60, 2), rng.uniform(2, 20, 2)) for _ in range(3)]
        guessed = np.concatenate([labels[near], rng.integers(0, 3, 3)]).astype(np.int64)
        scores = rng.integers(1, 30, len(guessed)) / 30
        found.append(Found(np.zeros((len(guessed), 4)), scores, guessed, listed([*moved, *far])))
    return found, truths


@pytest.mark.parametrize("seed", range(4))
def test_mask_average_precision_is_that_of_pycocotools(seed, capsys):
    need("pycocotools")
    from pycocotools import coco
    from pycocotools.cocoeval import COCOeval

    found, truths = scenes(seed)
    truth, results = coco.COCO(), coco.COCO()
    for target, images in ((truth, truths), (results, found)):
        rows = [
            {
                "image_id": i,
                "category_id": int(label) + 1,
                "segmentation": mask.to_coco(),
                "area": mask.area,
                "bbox": [0, 0, 1, 1],
                "iscrowd": int(each.crowd[k]) if isinstance(each, Objects) else 0,
                "score": float(each.scores[k]) if isinstance(each, Found) else 1,
            }
            for i, each in enumerate(images)
            for k, (label, mask) in enumerate(zip(each.labels, each.masks, strict=True))
        ]
        target.dataset = {
            "images": [{"id": i, "height": 60, "width": 80} for i in range(len(truths))],
            "categories": [{"id": i + 1, "name": str(i)} for i in range(3)],
            "annotations": [{**row, "id": k + 1} for k, row in enumerate(rows)],
        }
        target.createIndex()
    evaluation = COCOeval(truth, results, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    theirs = dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3].tolist(), strict=True))
    ours = average_precision(found, truths, masks=True)
    assert ours == pytest.approx(theirs, abs=1e-12) and 0 < ours["AP"] < ours["AP50"] < 1
    assert detection.figures(detection.found_rows(found, truths))["mask_AP"] == ours["AP"]


def test_without_masks_there_is_no_mask_ap():
    found, truths = scenes(0, images=2)
    bare = [Found(each.boxes, each.scores, each.labels) for each in found]
    assert {*detection.figures(detection.found_rows(bare, truths))} == {"AP", "AP50", "AP75"}
    with pytest.raises(ValueError, match="no masks to compare"):
        average_precision(bare, truths, masks=True)


# ------------------------------------------------------------------------------------------------------ labelled data


def coco_file(folder, segmentation, **size):
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 30, "width": 40, **size}],
        "categories": [{"id": 2, "name": "cat"}],
        "annotations": [
            {
                "image_id": 7,
                "category_id": 2,
                "bbox": [1, 2, 10, 5],
                **({"segmentation": segmentation} if segmentation else {}),
            }
        ],
    }
    path = folder / "a.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_coco_files_with_masks(tmp_path):
    bitmap = np.zeros((30, 40), bool)
    bitmap[2:7, 1:11] = True
    for segmentation in ([[1, 2, 11, 2, 11, 7, 1, 7]], RunMask.of(bitmap).to_coco()):
        path = coco_file(tmp_path, segmentation)
        (read,), _ = read_labels(path, None, 1, masks=True)
        assert np.array_equal(read.label.masks[0].array(), bitmap)
        (plain,), _ = read_labels(path, None, 1)
        assert plain.label.masks is None


@pytest.mark.parametrize(
    ("segmentation", "size", "message"),
    [
        (None, {}, "no 'segmentation'"),
        ([[1, 2]], {}, "at least 3 points"),
        ([[1, 2, 11, 2, 11, 7]], {"height": "30"}, "height or width"),
        ([[1, 2, 11, 2, 11, 7]], {"height": 0}, "height or width"),
        ({"size": [40, 30], "counts": [1200]}, {}, "its image"),
    ],
)
def test_damaged_masks_of_a_coco_file(segmentation, size, message, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        read_labels(coco_file(tmp_path, segmentation, **size), None, 1, masks=True)


def test_voc_has_no_masks_of_objects(tmp_path):
    with pytest.raises(CalibrationError, match="without masks of objects"):
        read_labels(tmp_path, None, 1, masks=True)


# ------------------------------------------------------------------------------------------------------------ drawing


def test_masks_are_drawn_half_transparent():
    image = Image.new("RGB", (200, 150), (90, 90, 90))
    top = np.zeros((28, 28), np.float32)
    top[:14] = 1
    box = (50.0, 60.0, 120.0, 140.0)
    found = Detection("cat", 3, 0.87, box, DetectedMask(top, box, (150, 200)))
    drawn = drawing.draw_detections(image, [found])
    colour = drawing.PALETTE[3]
    assert drawn.getpixel((80, 80)) == pytest.approx([(90 + each) / 2 for each in colour], abs=1)
    assert drawn.getpixel((80, 120)) == (90, 90, 90)  # below the mask
    beyond = Detection("cat", 3, 0.9, (-40.0, -40.0, -10.0, -10.0), DetectedMask(top, (-40, -40, -10, -10), (150, 200)))
    assert drawing.draw_detections(image, [beyond]).size == (200, 150)

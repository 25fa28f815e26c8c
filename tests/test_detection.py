"""The task detection: selection, AP against pycocotools, labelled data, pairs of detections, drawing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageChops

from evm_deploy.calib.evaluate import joined
from evm_deploy.data.boxes import SelectionSettings, greedy_nms, overlaps
from evm_deploy.data.geometry import Geometry
from evm_deploy.errors import CalibrationError
from evm_deploy.tasks import detection, drawing
from evm_deploy.tasks.average_precision import Found, Objects, average_precision, precision, precision_rows
from evm_deploy.tasks.detection_labels import read_labels
from evm_deploy.tasks.task import Detection, Reading
from tests.toolchains import need

CLASSES = 5


def boxes_of(rng, count, size=200):
    corners = rng.uniform(0, size, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(2, size / 2, (count, 2))], 1)


def scenes(seed, images=12, crowds=True):
    """Detections near true objects and far from them, with equal scores among them, for COCO's and our evaluation."""
    rng = np.random.default_rng(seed)
    found, truths = [], []
    for _ in range(images):
        true = boxes_of(rng, rng.integers(0, 9))
        labels = rng.integers(0, CLASSES, len(true))
        crowd = (rng.random(len(true)) < 0.2) if crowds else np.zeros(len(true), bool)
        truths.append(Objects(true, labels, np.zeros(len(true), bool), crowd))
        near = np.repeat(true, rng.integers(0, 4), 0)
        near = near + rng.normal(0, 4, near.shape)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        boxes = np.concatenate([near, boxes_of(rng, rng.integers(0, 12))])
        guessed = np.concatenate([np.resize(labels, len(near)), rng.integers(0, CLASSES, len(boxes) - len(near))])
        scores = rng.integers(1, 30, len(boxes)) / 30
        found.append(Found(boxes, scores, guessed.astype(np.int64)))
    return found, truths


def by_pycocotools(found, truths):
    need("pycocotools")
    from pycocotools import coco
    from pycocotools.cocoeval import COCOeval

    def rows(boxes, labels, **more):
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
        return [
            {"bbox": box.tolist(), "category_id": int(label) + 1, **{key: value[i] for key, value in more.items()}}
            for i, (box, label) in enumerate(zip(xywh, labels, strict=True))
        ]

    truth, results = coco.COCO(), coco.COCO()
    images = [{"id": i} for i in range(len(truths))]
    categories = [{"id": i + 1, "name": str(i)} for i in range(CLASSES)]
    for target, each_rows in (
        (truth, [rows(t.boxes, t.labels, iscrowd=t.crowd.astype(int).tolist()) for t in truths]),
        (results, [rows(f.boxes, f.labels, score=f.scores.tolist()) for f in found]),
    ):
        numbered = [{**row, "image_id": i} for i, each in enumerate(each_rows) for row in each]
        annotations = [
            {**row, "id": k + 1, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": row.get("iscrowd", 0)}
            for k, row in enumerate(numbered)
        ]
        target.dataset = {"images": images, "categories": categories, "annotations": annotations}
        target.createIndex()
    evaluation = COCOeval(truth, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75"), evaluation.stats[:3].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_that_of_pycocotools(seed, capsys):
    found, truths = scenes(seed, crowds=seed % 2 == 0)
    ours, theirs = average_precision(found, truths), by_pycocotools(found, truths)
    assert ours == pytest.approx(theirs, abs=1e-12)
    assert 0 < ours["AP"] < ours["AP50"] < 1


@pytest.mark.parametrize("seed", [0, 3])
def test_rows_add_up_in_any_order_and_parts(seed, capsys):
    """Also with equal scores, whose order decides the average precision."""
    found, truths = scenes(seed, images=20)
    truths = [replace(each, number=i) for i, each in enumerate(truths)]
    parts = [precision_rows(found[i : i + 3], truths[i : i + 3]) for i in range(0, 20, 3)]
    expected = by_pycocotools(found, truths)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        mixed = joined([parts[i] for i in rng.permutation(len(parts))])
        assert precision(mixed) == pytest.approx(expected, abs=1e-12)
        assert precision(mixed) == average_precision(found, truths)
    assert len(set(found[0].scores)) < len(found[0].scores)
    with_means = np.nanmean([average_precision([f], [t])["AP"] for f, t in zip(found, truths, strict=True)])
    assert abs(with_means - expected["AP"]) > 0.01, "a mean over images is no average precision"


def test_a_label_says_all_that_it_holds():
    """Images are found again by it."""
    first = Objects.of(np.array([[0, 0, 10, 10.0]] * 2000), np.zeros(2000, np.int64))
    moved = first.boxes.copy()
    moved[1000, 0] = 1e-9
    for other in (replace(first, boxes=moved), replace(first, number=1), replace(first, crowd=first.crowd | True)):
        assert str(other) != str(first)


def test_over_a_hundred_detections_of_a_class_are_cut_as_by_pycocotools(capsys):
    rng = np.random.default_rng(3)
    truths = [Objects.of(boxes_of(rng, 4), np.array([0, 0, 1, 1])) for _ in range(2)]
    found = [
        Found(np.concatenate([boxes_of(rng, 150), each.boxes]), rng.random(154), np.zeros(154, np.int64))
        for each in truths
    ]
    assert average_precision(found, truths) == pytest.approx(by_pycocotools(found, truths), abs=1e-12)


def test_average_precision_by_hand():
    truth = Objects.of(np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]]), np.array([0, 0]))
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30.0]])
    found = Found(boxes, np.array([0.9, 0.8, 0.7]), np.zeros(3, np.int64))
    # Recall 0.5 at precision 1, then 1.0 at precision 2/3: 51 recall points of 1, 50 of 2/3
    assert average_precision([found], [truth])["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    difficult = Objects(truth.boxes, truth.labels, np.array([False, True]), np.zeros(2, bool))
    assert average_precision([found], [difficult])["AP50"] == pytest.approx(1)
    assert np.isnan(average_precision([found], [Objects.of(np.empty((0, 4)), np.empty(0))])["AP"])
    assert average_precision([found[:0]], [truth])["AP"] == 0


def test_greedy_nms_keeps_the_best_of_each_heap():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 20], [40, 40, 50, 50]], np.float32)
    scores = np.array([0.5, 0.9, 0.4, 0.0], np.float32)
    assert overlaps(boxes[:1], boxes)[0] == pytest.approx([1, 9 / 11, 0.5, 0])
    assert greedy_nms(boxes, scores, 0.5, 9).tolist() == [1, 2]  # an overlap of exactly 0.5 suppresses nothing
    assert greedy_nms(boxes, scores, 0.4, 9).tolist() == [1]
    assert greedy_nms(boxes, scores, 0.9, 2).tolist() == [1, 0]
    assert greedy_nms(np.zeros((0, 4), np.float32), np.zeros(0), 0.5, 9).tolist() == []


def outputs(rows, count=None, rows_in_all=8):
    """rows: (box, score, label) of each image."""
    images = len(rows)
    made = {
        "boxes": np.zeros((images, rows_in_all, 4), np.float32),
        "scores": np.zeros((images, rows_in_all), np.float32),
        "labels": np.full((images, rows_in_all), -1, np.int32),
    }
    for i, each in enumerate(rows):
        for j, (box, score, label) in enumerate(each):
            made["boxes"][i, j], made["scores"][i, j], made["labels"][i, j] = box, score, label
    return made if count is None else {**made, "count": np.array(count, np.int32)}


def test_candidates_are_selected_class_by_class_and_mapped_to_the_image():
    rows = [((0, 0, 50, 50), 0.5, 1), ((2, 0, 52, 50), 0.9, 1), ((0, 0, 50, 50), 0.4, 2), ((90, 10, 140, 60), 0.3, 0)]
    place = Geometry((200, 400), (50, 100), (64, 128), (0, 0))
    (found,) = detection.select(outputs([rows]), SelectionSettings(), [place])
    assert found.labels.tolist() == [1, 2, 0]
    assert found.boxes.tolist() == [[8, 0, 208, 200], [0, 0, 200, 200], [360, 40, 400, 200]]  # clipped to the image
    (inside,) = detection.select(outputs([rows]), SelectionSettings(max_det=2))
    assert inside.boxes.tolist() == [[2, 0, 52, 50], [0, 0, 50, 50]]


def test_padded_rows_are_no_detections():
    rows = [((0, 0, 9, 9), 0.9, 0), ((0, 0, 9, 9), 0.8, 0), ((20, 0, 29, 9), 0.7, 0)]
    first, second = detection.select(outputs([rows, []], count=[2, 0]), SelectionSettings())
    assert first.scores.tolist() == [np.float32(0.9), np.float32(0.8)]  # the artifact has done the NMS
    assert len(second.scores) == 0
    (decoded, nothing) = detection.decode(outputs([rows, []], count=[2, 0]), Reading())
    assert decoded[0] == Detection("class 0", 0, float(np.float32(0.9)), (0, 0, 9, 9))
    assert nothing == []


def spec(dtype, *shape):
    return SimpleNamespace(dtype=dtype, shape=shape)


def test_outputs_are_checked():
    good = {"boxes": spec("float32", None, 9, 4), "scores": spec("float32", None, 9), "labels": spec("int32", None, 9)}
    assert detection.check(good, None) is None
    assert detection.check({**good, "count": spec("int32", None)}, None) is None
    for wrong in (
        {"boxes": good["boxes"]},
        {**good, "more": spec("int32", 1)},
        {**good, "labels": spec("int64", None, 9)},
        {**good, "boxes": spec("float32", None, 9, 5)},
        {**good, "scores": spec("float32", None, 8)},
    ):
        assert detection.check(wrong, None)


def test_pairs_of_two_runs():
    a = outputs([[((0, 0, 9, 9), 0.9, 0), ((50, 0, 60, 9), 0.8, 1)]], count=[2])
    b = outputs([[((50, 0, 60, 9.5), 0.81, 1), ((0, 0, 9, 9), 0.79, 0)]], count=[2])
    left, right, share = detection.align(a, b)
    assert share == 1
    assert left["labels"].tolist() == right["labels"].tolist() == [0, 1]
    assert right["boxes"][1].tolist() == [50, 0, 60, 9.5]
    assert detection.align(a, b, 0.01)[2] == 0.5  # the second pair: 0.11 apart in score
    assert detection.align(a, b, 0.005)[2] == 0
    assert detection.align(a, outputs([[((0, 0, 9, 9), 0.9, 0)]], count=[1]), 0.85)[2] == 1  # 0.8 may be missing
    lost = {**b, "scores": b["scores"] * np.nan}
    assert detection.align(a, lost, 0.5)[2] == 0
    c = outputs([[((50, 0, 60, 9), 0.8, 2), ((0, 0, 9, 9), 0.9, 0)]], count=[2])
    assert detection.agree(a, c) == 0.5
    assert detection.agree(outputs([[]], count=[0]), outputs([[]], count=[0])) == 1
    assert detection.agree(a, outputs([[]], count=[0])) == 0


# ------------------------------------------------------------------------------------------------------ labelled data


def coco_file(folder, **changes):
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (40, 30)).save(folder / "val2017" / name)
    content = {
        "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
        "categories": [{"id": 90, "name": "自転車"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [1, 2, 10, 5], "iscrowd": 0},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 4, 4], "iscrowd": 1},
        ],
        **changes,
    }
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def pairs_of_all_sorted(expected, actual, tolerance):
    """Return the pairs of `matches` by its words: all places in order, the nearest first."""
    shares = overlaps(expected.boxes, actual.boxes)
    apart = np.abs(expected.scores[:, None] - actual.scores)
    largest = tolerance * max(1.0, np.abs(expected.boxes).max())
    pairs = []
    for place in np.argsort(apart - shares, axis=None, kind="stable"):
        row, column = np.unravel_index(place, shares.shape)
        near = np.abs(expected.boxes[row] - actual.boxes[column]).max() <= largest
        same = expected.labels[row] == actual.labels[column] and shares[row, column] >= 0.5
        if same and near and apart[row, column] <= tolerance and all(row != i and column != j for i, j in pairs):
            pairs.append((int(row), int(column)))
    return sorted(pairs)


@pytest.mark.parametrize("tolerance", [0.2, np.inf])
@pytest.mark.parametrize("seed", range(3))
def test_crowds_are_paired_nearest_first(seed, tolerance):
    rng = np.random.default_rng(seed)

    def crowd(count):
        corners = rng.integers(0, 12, (count, 2)).astype(np.float64)
        boxes = np.concatenate([corners, corners + rng.integers(8, 12, (count, 2))], 1)
        return Found(boxes, rng.integers(1, 9, count) / 8, rng.integers(0, 2, count))

    expected, actual = crowd(40), crowd(31)
    found = detection.matches(expected, actual, tolerance)
    assert list(zip(*(each.tolist() for each in found), strict=True)) == pairs_of_all_sorted(
        expected, actual, tolerance
    )
    assert len(found[0]) > 5


def test_coco_files(tmp_path):
    path = coco_file(tmp_path)
    (first, second), order = read_labels(path, ["自転車", "dog", "cat"], 3)
    assert (first.source.name, second.source.name) == ("a.png", "b.png") and "by name" in order
    assert second.label.boxes.tolist() == [[1, 2, 11, 7], [0, 0, 4, 4]]
    assert second.label.labels.tolist() == [0, 2]
    assert second.label.crowd.tolist() == [False, True]
    assert first.label.boxes.shape == (0, 4)
    items, order = read_labels(path, None, 2)
    assert items[1].label.labels.tolist() == [1, 0] and "by rising id" in order
    assert [item.label.number for item in items] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "names", "count", "message"),
    [
        ({}, ["cat"], 1, "1 of 2 categories are not among the network's classes: 自転車"),
        ({}, None, 3, "has 2 categories, the network has 3 classes"),
        ({"annotations": [{"image_id": 8}]}, None, 2, "no 8"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2]}]}, None, 2, "not a COCO file"),
        ({"annotations": [{"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, None]}]}, None, 2, "not finite"),
        ({"images": [{"id": 7, "file_name": "../../b.png"}], "annotations": []}, None, 2, "outside the folder"),
        ({"images": [{"id": 7, "file_name": "c.png"}], "annotations": []}, None, 2, "not found beside it"),
        ({"categories": 3}, None, 2, "not a COCO file"),
        ({"annotations": []}, None, 2, "no image has an object to find"),
    ],
)
def test_odd_coco_files_are_refused(changes, names, count, message, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        read_labels(coco_file(tmp_path, **changes), names, count)


def test_a_folder_of_one_coco_file_names_the_file(tmp_path):
    path = coco_file(tmp_path)
    with pytest.raises(CalibrationError, match=re.escape(f"give the COCO file:  {path}")):
        read_labels(path.parent, None, 2)


VOC = """<annotation><filename>{name}</filename>{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>"""


def voc_folder(folder, text):
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / "a.png")
    (folder / "Annotations" / "a.xml").write_text(text, encoding="utf-8")
    return folder


def test_voc_folders(tmp_path):
    objects = OBJECT.format(name="dog", difficult=1) + OBJECT.format(name="cat", difficult=0)
    (found,), _ = read_labels(voc_folder(tmp_path, VOC.format(name="a.png", objects=objects)), None, 2)
    assert found.source.name == "a.png"
    assert found.label.boxes.tolist() == [[0, 2, 10, 20]] * 2
    assert found.label.labels.tolist() == [1, 0]
    assert found.label.ignored.tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "not a VOC annotation"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "document type"),
        (VOC.format(name="../../a.png", objects=""), "has 0 categories"),
        (VOC.format(name="a.png", objects="<object><name>x</name></object>"), "no box of four numbers"),
        (VOC.format(name="a.png", objects="<object></object>"), "an object has no name"),
        (VOC.format(name="a.png", objects=OBJECT.format(name="dog", difficult=1)), "no image has an object to find"),
    ],
)
def test_odd_voc_files_are_refused(text, message, tmp_path):
    with pytest.raises(CalibrationError, match=message):
        read_labels(voc_folder(tmp_path, text), None, 1)


def test_a_folder_without_labels_is_named(tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CalibrationError, match=r"VOC annotations"):
            read_labels(source, None, 1)


# ------------------------------------------------------------------------------------------------------------ drawing


def differing(before, after):
    return ImageChops.difference(before, after).getbbox()


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (200, 150), (90, 90, 90))
    drawn = drawing.draw_detections(image, [Detection("cat", 3, 0.87, (50, 60, 120, 140))])
    left, top, right, bottom = differing(image, drawn)
    assert (left, right, bottom) == (50, 120, 140) and top < 60  # the tag is above
    assert drawn.getpixel((119, 139)) == drawing.PALETTE[3]
    assert image.getpixel((50, 60)) == (90, 90, 90)  # the original is untouched
    assert differing(image, drawing.draw_detections(image, [Detection("cat", 3, 0.2, (50, 60, 120, 140))])) is None


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (-30, -30, 900, 900), (199.5, 149.5, 200, 150), (0, 0, 0, 0)])
@pytest.mark.parametrize("name", ["a", "自転車", "a" * 300, "דוב", "👩‍🚀", "\n", ""])
def test_any_box_and_any_name_is_drawn(box, name):
    image = Image.new("L", (200, 150))
    drawn = drawing.draw_detections(image, [Detection(name, 41, 0.5, box)])
    assert drawn.size == image.size and drawn.mode == "RGB"
    assert differing(image.convert("RGB"), drawn)


def test_a_name_without_glyphs_is_drawn_as_its_number(monkeypatch):
    monkeypatch.setattr(drawing, "font_files", lambda: ())
    drawing.font_for.cache_clear()
    assert drawing.font_for("cat 0.5", 12) and drawing.font_for("\U00012000", 12) is None
    image = Image.new("RGB", (200, 150))
    unwritable, number = (
        drawing.draw_detections(image, [Detection(name, 7, 0.5, (50, 60, 120, 140))]) for name in ("\U00012000", "#7")
    )
    assert differing(unwritable, number) is None
    drawing.font_for.cache_clear()

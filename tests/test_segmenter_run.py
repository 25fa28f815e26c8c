"""Label maps for people: predict, evm-run's lines, JSON and drawn images, and the mIoU of the trained segmenter."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evm_deploy import cli, load
from evm_deploy.commands.detections import shares
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks.mean_iou import mean_iou, pixel_counts
from evm_deploy.tasks.task import LabelMap
from tests import segmenters

SIZE = (72, 104)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, bundle_of):
    """A golden UPerNet with class names of many scripts, two images an inference."""
    return bundle_of(
        segmenters.named(tmp_path_factory.mktemp("named")), ExportPlan("onnx", "fp16", imgsz=SIZE, batch=2)
    )


@pytest.fixture
def photos(tmp_path):
    """Images of other sizes than the input."""
    folder = tmp_path / "photos"
    folder.mkdir(parents=True)
    for name, (height, width) in {"a.png": (300, 400), "b.jpg": (1, 1)}.items():
        Image.fromarray(synthetic_image(height, width, 5)).save(folder / name)
    return folder


def run(capsys, *args):
    code = cli.run_main([str(each) for each in args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_maps_are_of_the_size_of_the_image(bundle, photos):
    """The map of the input, mapped back by hand: 300x400 is resized by 0.24, and padded at the right."""
    images = [photos / "a.png", photos / "b.jpg", Image.new("RGB", (4000, 3000)), np.zeros((50, 60, 3), np.uint8)]
    with load(bundle.path) as model:
        answers = model.predict(images)
        pixels = np.stack([model.preprocessing.pixels(image) for image in images[:2]])
        plain = model.classify(pixels)
        assert set(model.spent_ms) == {"preprocess", "inference", "postprocess"}
    assert {type(each) for each in answers} == {LabelMap}
    assert [each.map.shape for each in answers] == [(300, 400), (1, 1), (3000, 4000), (50, 60)]
    first = answers[0]
    rows, columns = ((np.arange(side) + 0.5) * 0.24 for side in (300, 400))
    want = plain[0].map[np.ix_(rows.astype(int), columns.astype(int))]
    assert (first.map == want).all() and first.map.dtype == np.uint8 and len(first) > 1
    assert first.palette == tuple(map(tuple, segmenters.PALETTE))
    assert sum(each.score for each in first) == pytest.approx(1)
    assert all(each.label == segmenters.NAMES[each.index] for each in first)


def test_red_for_blue_gives_another_map(bundle, photos):
    """Nothing can tell that an array is BGR: its map is simply another one."""
    rgb = np.asarray(Image.open(photos / "a.png"))
    with load(bundle.path) as model:
        right, wrong = model.predict([rgb, np.ascontiguousarray(rgb[..., ::-1])])
    assert (right.map != wrong.map).any()


def test_one_line_an_image_and_drawn_copies(bundle, photos, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    (photos / "c.png").write_bytes(b"no image")
    code, out, err = run(capsys, bundle.path, photos, "--save", drawn, "-q")
    lines = out.splitlines()
    assert code == 2 and "c.png is not an image" in err and "1 of 3 images could not be read" in err
    assert [line.partition(": ")[0] for line in lines] == [str(photos / name) for name in ("a.png", "b.jpg")]
    assert all(" ms, inference" in line and " % " in line for line in lines)
    assert any(name in out for name in segmenters.NAMES)
    copy, original = (np.asarray(Image.open(folder / "a.png")).astype(int) for folder in (drawn, photos))
    with load(bundle.path) as model:
        (answer,) = model.predict(photos / "a.png")
    corner = np.array(segmenters.PALETTE)[answer.map[-1, -1]]
    assert copy.shape == original.shape and np.abs(copy[-1, -1] - (corner + original[-1, -1]) / 2).max() <= 1


def test_json_has_every_class_that_is_present(bundle, photos, capsys):
    code, out, _ = run(capsys, bundle.path, photos / "a.png", "--json")
    (row,) = json.loads(out)
    assert code == 0 and {*row} == {"image", "classes", "ms"}
    assert {*row["classes"][0]} == {"label", "index", "share"}
    assert sum(each["share"] for each in row["classes"]) == pytest.approx(1)


def test_what_cannot_be_asked_for(bundle, photos, capsys):
    code, _, err = run(capsys, bundle.path, photos / "a.png", "--min-score", "0.5")
    assert code == 2 and "--min-score is for detections: the bundle gives label maps" in err


def test_a_self_test_compares_maps(bundle, capsys):
    code, out, _ = run(capsys, bundle.path, "--selftest")
    assert code == 0 and "not in common" in out and "label_map" in out and "PASSED" in out


def test_shares():
    values = np.zeros((50, 50), np.uint8)
    values[:25], values[0, 0] = 1, 2
    assert shares(LabelMap(values, ("sky", "道路", "tree"))) == "50.0 % sky, 50.0 % 道路, <0.1 % tree"
    many = LabelMap(np.arange(12, dtype=np.uint8)[None])
    assert shares(many).endswith("8.3 % class 7, and 4 more")


def counted(found, truths):
    parts = [pixel_counts(each.map, truth, 9) for each, truth in zip(found, truths, strict=True)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_trained_segmenter_keeps_its_mean_iou(target, trained, bundle_of):
    folder = trained / "detseg"
    if not folder.is_dir():
        pytest.skip("the trained segmenter (../shared/trained/detseg) is not beside this checkout")
    sys.path.insert(0, str(folder))
    from scenes import scene

    checkpoint = folder / "upernet_scenes128.pth"
    scenes = [scene(901, i) for i in range(60)]
    truths = [each["map"] for each in scenes]
    module, spec = load_checkpoint(checkpoint)
    plan = ExportPlan(target, imgsz=(128, 128), batch=4, scan="portable" if target == "openvino" else "auto")
    with load(bundle_of(checkpoint, plan).path) as model:
        answers = model.predict([each["image"] for each in scenes])
        normalise = model.preprocessing.normalise
    selection, in_float = module.selection(None, (128, 128)), []
    for start in range(0, len(scenes), 10):
        images = normalise(np.stack([each["image"] for each in scenes[start : start + 10]]))
        with torch.inference_mode():
            in_float += [LabelMap(each) for each in selection(module(torch.from_numpy(images)))[0].numpy()]
    assert spec.num_classes == 9
    ours, want = (mean_iou(counted(each, truths)) for each in (answers, in_float))
    assert want["mIoU"] > 0.8 and want["pixel_accuracy"] > 0.97
    assert all(abs(ours[name] - want[name]) < 0.001 for name in want)

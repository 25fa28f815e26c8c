"""Detections for people: predict, evm-run's lines, JSON and drawn images, and AP of the trained detector's bundle."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from evm_deploy import cli, load
from evm_deploy.commands.detections import counts
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks import detection
from evm_deploy.tasks.average_precision import Found, Objects
from evm_deploy.tasks.task import Detection
from tests import detectors

SIZE = (96, 128)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(detector_bundles):
    return detector_bundles["graph"]


@pytest.fixture
def photos(tmp_path):
    """Images of other sizes than the input, one of them unreadable."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, (height, width) in {"a.png": (300, 400), "b.jpg": (1, 1), "more/a.png": (77, 20)}.items():
        Image.fromarray(synthetic_image(height, width, 5)).save(folder / name)
    return folder


def test_boxes_are_in_pixels_of_the_image(bundle, named_detector, photos):
    """The float model on the same pixels, mapped back by hand: 300x400 is resized by 0.32, and padded at the bottom."""
    with load(bundle.path) as model:
        (answer,) = model.predict(photos / "a.png")
        pixels = model.preprocessing.pixels(photos / "a.png")
        assert set(model.spent_ms) == {"preprocess", "inference", "postprocess"} and min(model.spent_ms.values()) > 0
        normalised = torch.from_numpy(model.preprocessing.normalise(pixels[None]))
    module, _ = load_checkpoint(named_detector)
    with torch.inference_mode():
        boxes, scores, labels, count = module.selection(SelectionSettings(), SIZE)(*module(normalised))
    assert len(answer) == int(count) == 100
    want = np.minimum(boxes[0].numpy() / 0.32, [400, 300, 400, 300])
    assert np.abs(np.array([each.box for each in answer]) - want).max() < 0.05
    assert [each.index for each in answer] == labels[0].tolist()
    assert np.allclose([each.score for each in answer], scores[0], atol=1e-4)
    assert all(each.label == detectors.CLASSES[each.index] for each in answer)
    assert {type(each) for each in answer} == {Detection}


def test_an_image_alone_or_among_others_has_the_same_detections(bundle, photos):
    images = [photos / "a.png", np.zeros((50, 60, 3), np.uint8), Image.new("RGBA", (4000, 3000)), photos / "more/a.png"]
    with load(bundle.path) as model:
        together = model.predict(images)
        alone = [model.predict(image)[0] for image in images]
        tensors = model.classify(np.zeros((1, *SIZE, 3), np.uint8))
    assert [[each.index for each in answer] for answer in together] == [[e.index for e in answer] for answer in alone]
    for answer, (width, height) in zip(together, ((400, 300), (60, 50), (4000, 3000), (20, 77)), strict=True):
        boxes = np.array([each.box for each in answer])
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert max(side for each in tensors[0] for side in each.box) <= 128


def test_red_for_blue_gives_other_detections(bundle, photos):
    """Nothing can tell that an array is BGR: its detections are simply other ones."""
    rgb = np.asarray(Image.open(photos / "a.png"))
    with load(bundle.path) as model:
        right, wrong = model.predict([rgb, np.ascontiguousarray(rgb[..., ::-1])])
    assert [each.box for each in right] != [each.box for each in wrong]


def run(capsys, *args):
    code = cli.run_main([str(each) for each in args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_one_line_an_image_and_drawn_copies(bundle, photos, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    (photos / "c.png").write_bytes(b"no image")
    drawn.mkdir()
    (drawn / "a.png").write_text("mine")
    code, out, err = run(capsys, bundle.path, photos, "--save", drawn, "--min-score", "0.5", "-q")
    lines = out.splitlines()
    assert code == 2 and "c.png is not an image" in err and "1 of 4 images could not be read" in err
    assert [line.partition(": ")[0] for line in lines] == [str(photos / n) for n in ("a.png", "b.jpg", "more/a.png")]
    assert all("preprocess" in line and " ms, inference" in line and "postprocess" in line for line in lines)
    assert any(name in out for name in detectors.CLASSES)
    assert (drawn / "a.png").read_text() == "mine"  # nothing is replaced
    assert sorted(path.name for path in drawn.iterdir()) == ["a-2.png", "a-3.png", "a.png", "b.jpg"]
    copy, original = Image.open(drawn / "a-2.png"), Image.open(photos / "a.png")
    assert copy.size == original.size and ImageChops.difference(copy, original).getbbox()


def test_json_has_every_box_above_the_score(bundle, photos, capsys):
    code, out, _ = run(capsys, bundle.path, photos / "a.png", photos / "b.jpg", "--json", "--min-score", "0")
    first, second = json.loads(out)
    assert code == 0 and len(first["detections"]) == 100
    assert {*first["detections"][0]} == {"label", "index", "score", "box"}
    assert {*first["detections"][0]["box"]} == {"x1", "y1", "x2", "y2"} and {*second["ms"]} == {*first["ms"]}
    code, out, _ = run(capsys, bundle.path, photos / "a.png", "--json", "--min-score", "1")
    assert json.loads(out)[0]["detections"] == []


def test_what_cannot_be_asked_for(bundle, photos, tmp_path, capsys):
    assert "use a score from 0 to 1" in run(capsys, bundle.path, photos, "--min-score", "7")[2]
    code, _, err = run(capsys, bundle.path, photos / "a.png", "--save", photos / "a.png")
    assert code == 2 and "cannot be written" in err


def test_a_classifier_draws_nothing(micro_bundle, photos, tmp_path, capsys):
    code, _, err = run(capsys, micro_bundle.path, photos / "a.png", "--save", tmp_path / "drawn")
    assert code == 2 and "--save draws boxes and label maps: the bundle gives scores" in err
    assert not (tmp_path / "drawn").exists()


def test_a_self_test_compares_detections(bundle, capsys):
    code, out, _ = run(capsys, bundle.path, "--selftest")
    assert code == 0 and "not in common" in out and "PASSED" in out


def test_counts():
    found = [Detection(name, 0, 0.5, (0, 0, 1, 1)) for name in ("bus", "自転車", "bus")]
    assert counts(found) == "2 bus, 1 自転車"
    assert counts([]) == "no detections"


def test_the_trained_detector_keeps_its_average_precision(trained, bundle_of):
    folder = trained / "detseg"
    if not folder.is_dir():
        pytest.skip("the trained detector (../shared/trained/detseg) is not beside this checkout")
    sys.path.insert(0, str(folder))
    from scenes import scene

    checkpoint = folder / "retinanet_scenes128.pth"
    scenes = [scene(901, i) for i in range(100)]
    truths = [Objects.of(each["boxes"], each["labels"]) for each in scenes]
    module, spec = load_checkpoint(checkpoint)
    with load(bundle_of(checkpoint, ExportPlan("onnx", imgsz=(128, 128))).path) as model:
        answers = model.predict([each["image"] for each in scenes])
        normalise = model.preprocessing.normalise
    found = [
        Found(
            np.array([each.box for each in answer]).reshape(-1, 4),
            np.array([each.score for each in answer]),
            np.array([each.index for each in answer], np.int64),
        )
        for answer in answers
    ]
    selection, in_float = module.selection(SelectionSettings(), (128, 128)), []
    for start in range(0, len(scenes), 10):
        images = normalise(np.stack([each["image"] for each in scenes[start : start + 10]]))
        with torch.inference_mode():
            values = selection(*module(torch.from_numpy(images)))
        outputs = {name: value.numpy() for name, value in zip(selection.outputs, values, strict=True)}
        in_float += detection.select(outputs, SelectionSettings())
    ours, want = detection.score(found, truths), detection.score(in_float, truths)
    assert spec.num_classes == 8 and want["AP"] > 0.7
    assert all(abs(ours[name] - want[name]) < 0.001 for name in want)


def test_a_closed_bundle_says_so(bundle, photos):
    with load(bundle.path) as model:
        pass
    with pytest.raises(UsageError, match="is closed"):
        model.predict(photos / "a.png")

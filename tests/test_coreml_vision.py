"""--vision: a detector as the pipeline that Vision and Xcode take. Its stages are computed here, not on a Mac."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export.coreml import vision
from evm_deploy.export.coreml.settings import CoreMlSettings
from evm_deploy.export.coreml.target import TARGET
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.export.target import check_plan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.mil import MilRuntime
from evm_deploy.tasks.detection import align
from tests import detectors
from tests.toolchains import need

SIZE = (64, 96)
ROWS = 864 + 216 + 54 + 18 + 9  # anchors of the five levels
PLAN = ExportPlan("coreml", "fp32", imgsz=SIZE, settings=CoreMlSettings(vision=True), iou=0.45, score_thr=0.2)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bundle(named_detector, bundle_of):
    need("coremltools")
    return bundle_of(named_detector, PLAN)


@pytest.fixture(scope="module")
def model(bundle):
    """coremltools opens the package and validates its specification."""
    import coremltools as ct

    return ct.models.MLModel(str(bundle.path / vision.FILE), skip_model_load=True)


@pytest.fixture(scope="module")
def stage(model, tmp_path_factory):
    """The first stage alone, from the pipeline."""
    import coremltools as ct

    first = model.get_spec().pipeline.models[0]
    return ct.models.MLModel(first, weights_dir=model.weights_dir, skip_model_load=True)


@pytest.fixture(scope="module")
def wrapped(named_detector):
    """The float detector with its preprocessing, as it is exported."""
    network = load_checkpoint(named_detector)
    plan, preprocessing = complete(check_plan(TARGET, PLAN), network.spec)
    return with_pre_and_postprocessing(network, plan, preprocessing), plan


def test_the_interface_is_the_one_that_vision_takes(bundle, model):
    spec = model.get_spec()
    network, suppression = spec.pipeline.models
    assert [each.WhichOneof("Type") for each in (spec, network, suppression)] == [
        *("pipeline", "mlProgram", "nonMaximumSuppression")
    ]
    image, *thresholds = spec.description.input
    assert (image.type.imageType.width, image.type.imageType.height) == SIZE[::-1]
    assert {each.name: each.type.isOptional for each in thresholds} == {
        "iouThreshold": True,
        "confidenceThreshold": True,
    }
    for each in (spec, suppression):
        assert [value.name for value in each.description.output] == ["coordinates", "confidence"]
        columns = [value.type.multiArrayType.shapeRange.sizeRanges[1].upperBound for value in each.description.output]
        assert columns == [4, len(detectors.CLASSES)]
    shapes = [[*value.type.multiArrayType.shape] for value in network.description.output]
    assert shapes == [[ROWS, 4], [ROWS, len(detectors.CLASSES)]]
    found = suppression.nonMaximumSuppression
    assert (found.iouThreshold, found.confidenceThreshold, found.pickTop.perClass) == (0.45, 0.2, True)
    assert tuple(found.stringClassLabels.vector) == detectors.CLASSES
    named = {value.name for value in suppression.description.input}
    fields = ("confidence", "coordinates", "iouThreshold", "confidenceThreshold")
    assert {getattr(found, f"{field}InputFeatureName") for field in fields} == named
    facts = bundle.manifest.details["vision"]
    assert facts["file"] == vision.FILE and "best class of each anchor" in facts["selection"]
    assert f"{vision.FILE}/Manifest.json" in bundle.manifest.files
    assert "VNRecognizedObjectObservation" in (bundle.path / "README.md").read_text(encoding="utf-8")


def every_anchor(module, pixels):
    """Boxes of all anchors, clipped, and their scores of every class, from the maps, with loops and numpy."""
    with torch.inference_mode():
        x = (torch.from_numpy(pixels).float() * module.scale + module.shift).permute(0, 3, 1, 2)
        maps = [each[0].double().numpy() for each in module.model(x)]
    anchors, classes = module.selection.anchors, module.selection.classes
    boxes, scores = [], []
    for logits, deltas, stride in zip(maps[:5], maps[5:], anchors.strides, strict=True):
        sides = anchors.sides(stride).double().numpy()
        for a, y, x in np.ndindex(len(sides), *logits.shape[1:]):
            dx, dy, dw, dh = deltas[4 * a : 4 * a + 4, y, x]
            cx, cy = x * stride + sides[a][0] * dx, y * stride + sides[a][1] * dy
            w, h = sides[a] * np.exp(np.clip([dw, dh], -4.135166556742356, 4.135166556742356))
            boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
            scores.append(1 / (1 + np.exp(-logits[classes * a : classes * (a + 1), y, x])))
    return np.clip(boxes, 0, [SIZE[1], SIZE[0]] * 2), np.array(scores)


def test_the_stages_give_the_best_class_of_each_anchor(stage, wrapped, tmp_path):
    """The first one in the MIL runtime, the second in numpy, against loops over the maps of the float network."""
    module, _ = wrapped
    pixels = synthetic_image(*SIZE, 3)[None]
    stage.save(str(tmp_path / "stage.mlpackage"))
    with MilRuntime(tmp_path / "stage.mlpackage") as runtime:
        found = runtime.run({"image": pixels})
    coordinates, confidence = (found[name] for name in vision.RAW)
    assert coordinates.shape == (ROWS, 4) and coordinates.min() >= 0 and coordinates.max() <= 1
    assert confidence.sum(1).max() <= 1 and ((confidence > 0).sum(1) <= 1).all()
    boxes, scores = every_anchor(module, pixels)
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    one = np.where(np.eye(len(detectors.CLASSES), dtype=bool)[scores.argmax(1)], scores, 0) * kept[:, None]
    scale = [SIZE[1], SIZE[0]]
    coded = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / [*scale, *scale]
    for have, want in ((confidence, one), (coordinates, coded)):
        assert np.abs(np.sort(have, 0) - np.sort(want, 0)).max() < 1e-4  # the same rows in another order
    ours = vision.suppressed(np.float32(coded), np.float32(one), 0.45, 0.2, SIZE)
    theirs = vision.suppressed(coordinates, confidence, 0.45, 0.2, SIZE)
    assert ours["boxes"].shape[1] > 20 and align(ours, theirs)[2] == 1


def test_suppression_is_that_of_the_specification():
    """The worse of two boxes of a class that overlap by more goes; other classes and lower overlaps stay."""
    coordinates = np.float32([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.36], [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.2, 0.2]])
    confidence = np.float32([[0.9, 0], [0.8, 0], [0, 0.7], [0.1, 0]])
    found = vision.suppressed(coordinates, confidence, 0.5, 0.25, (100, 200))
    assert found["labels"].tolist() == [[0, 1]] and np.allclose(found["scores"], [[0.9, 0.7]])
    assert np.allclose(found["boxes"], [[[60, 30, 140, 70]] * 2])


@pytest.mark.parametrize("mistake", ["centres", "classes", "threshold"])
def test_another_network_is_noticed(mistake, stage, wrapped):
    module, plan = wrapped
    right = vision.best_class_module(module)
    vision.verify(stage, right, plan, plan.selection)
    wrong = vision.best_class_module(module)
    if mistake == "centres":
        wrong.selection.anchors = replace(right.selection.anchors, offset=0.5)
    elif mistake == "classes":
        forward = wrong.selection.forward
        wrong.selection.forward = lambda *maps: (lambda where, what: (where, what.roll(1, 1)))(*forward(*maps))
    else:
        wrong.selection.before = 20
    with pytest.raises(ParityError, match=r"vision\.mlpackage: "):
        vision.verify(stage, wrong, plan, plan.selection)


def test_plans_without_a_pipeline():
    for plan, said in (
        (ExportPlan("coreml", input="tensor", settings=CoreMlSettings(vision=True)), "Vision gives images"),
        (ExportPlan("coreml", "int8", calib="x", settings=CoreMlSettings(vision=True)), "for fp16 and fp32"),
    ):
        with pytest.raises(UsageError, match=said):
            check_plan(TARGET, plan)
    classifier = SimpleNamespace(float_module=torch.nn.Identity())
    with pytest.raises(UsageError, match="for detectors with anchors"):
        vision.write(classifier, ExportPlan("coreml"), None)

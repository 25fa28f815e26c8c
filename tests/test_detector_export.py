"""Exported detectors: against mmdet's detections in every runtime, mistakes that the verification rejects, refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from evm_deploy import load
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.errors import UsageError
from evm_deploy.export.pipeline import complete
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import make_test_inputs
from evm_deploy.export.source import Source
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.export.verify import FloatRun, verify
from evm_deploy.model import Network
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks import detection
from evm_deploy.tasks.detection import DETECTION
from tests import detectors
from tests.toolchains import need

SIZE = (96, 128)


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """A golden RetinaNet on disk."""
    return detectors.saved(tmp_path_factory.mktemp("detector"))


def is_golden(found, case, j):
    assert found.labels.tolist() == case.expected[f"image{j}/labels"].tolist()
    assert np.abs(found.scores - case.expected[f"image{j}/scores"]).max() < 1e-4
    assert np.abs(found.boxes - case.expected[f"image{j}/boxes"]).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "scan", "nms"),
    [
        ("onnx", "auto", "graph"),
        ("onnx", "portable", "none"),
        ("openvino", "plugin", "none"),
        ("openvino", "portable", "graph"),
        ("coreml", "auto", "graph"),
    ],
)
def test_an_artifact_gives_the_detections_of_mmdet(target, scan, nms, detector, bundle_of):
    if target == "coreml":
        need("coremltools")
    batch = "dynamic" if (target, scan) == ("openvino", "portable") else 2
    plan = ExportPlan(target, "fp32", imgsz=SIZE, batch=batch, input="tensor", scan=scan, nms=nms)
    case = detectors.case("retina_micro")
    with load(bundle_of(detector, plan).path) as model:
        (name,) = model.inputs
        outputs = model.run({name: case.inputs})
        assert all(check.ok for check in model.selftest())
    dtypes = {"boxes": "float32", "scores": "float32", "labels": "int32", "count": "int32"}
    assert {name: str(value.dtype) for name, value in outputs.items()} == {name: dtypes[name] for name in outputs}
    assert ("count" in outputs) == (nms == "graph")
    found = detection.select(outputs, SelectionSettings(), detectors.places(case))
    is_golden(found[1], case, 1)
    if nms == "none":  # the graph clips to its input: the first image is padded
        is_golden(found[0], case, 0)


@pytest.mark.slow
def test_batches_of_any_size_and_images_without_detections(tmp_path, bundle_of):
    case = detectors.case("retina_micro")
    bias = torch.from_numpy(case.state["bbox_head.retina_cls.bias"]).clone()
    bias[9:] -= 30  # only the first two anchors find anything
    path = detectors.saved(tmp_path, **{"bbox_head.retina_cls.bias": bias})
    plan = ExportPlan("onnx", imgsz=SIZE, batch="dynamic", input="tensor", max_det=7, score_thr=0.3)
    with load(bundle_of(path, plan).path) as model:
        alone = [model.run({"tensor": case.inputs[i : i + 1]}) for i in (0, 1)]
        three = model.run({"tensor": case.inputs[[1, 0, 1]]})
    for name in ("boxes", "scores", "labels", "count"):
        for i, image in enumerate((1, 0, 1)):
            assert np.allclose(three[name][i], alone[image][name][0], atol=1e-4)
    assert three["boxes"].shape == (3, 7, 4)
    silent = detectors.saved(tmp_path, **{"bbox_head.retina_cls.bias": bias - 60})
    with load(bundle_of(silent, plan).path) as model:
        nothing = model.run({"tensor": case.inputs[[0, 1, 1]]})
    assert nothing["count"].tolist() == [0, 0, 0]
    assert (nothing["labels"] == -1).all() and not nothing["scores"].any()


@pytest.mark.slow
def test_the_selection_is_float32_in_float16(detector, bundle_of):
    bundle = bundle_of(detector, ExportPlan("onnx", "fp16", imgsz=SIZE))
    graph = onnx.shape_inference.infer_shapes(onnx.load(bundle.path / "model.onnx")).graph
    half = onnx.TensorProto.FLOAT16
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == half}
    halves |= {tensor.name for tensor in graph.initializer if tensor.data_type == half}
    nodes = [node for node in graph.node if node.name.startswith("selection/")]
    own = {name for node in nodes for name in node.output}
    assert len(nodes) > 50 and halves
    assert not halves & own
    entering = {name for node in nodes for name in node.input if name in halves}
    assert not entering, "the maps enter through casts"


# --------------------------------------------------------------------------------- mistakes put in on purpose


class Artifact:
    """A runtime whose artifact is a torch module."""

    def __init__(self, model, selection):
        self.inputs = {"tensor": SimpleNamespace(dtype="float32", shape=(None, 3, *SIZE), name="tensor")}
        self._model, self._selection = model, selection

    def run(self, feeds):
        with torch.inference_mode():
            values = self._selection(*self._model(torch.from_numpy(feeds["tensor"])))
        return {name: value.numpy() for name, value in zip(self._selection.outputs, values, strict=True)}


def ratios_inner(selection):
    for i in range(5):
        sides = selection.get_buffer(f"sides{i}").reshape(3, 3, 2)
        selection.register_buffer(f"sides{i}", sides.transpose(0, 1).reshape(9, 2), persistent=False)


def one_class(selection):
    right = selection.suppressed
    selection.suppressed = lambda boxes, scores, label: right(boxes, scores, torch.zeros_like(label))


def class_agnostic(selection):
    """NMS without regard to classes, with right labels."""
    right = selection.suppressed

    def wrong(boxes, scores, label):
        boxes, scores, rows, count = right(boxes, scores, torch.zeros_like(label))
        return boxes, scores, torch.where(rows >= 0, label[:, : rows.shape[1]].to(torch.int32), -1), count

    selection.suppressed = wrong


def changed(**values):
    return lambda selection: [setattr(selection, key, value) for key, value in values.items()]


MISTAKES = {
    "anchors in the middle of the cell": lambda s: setattr(s, "anchors", replace(s.anchors, offset=0.5)),
    "ratios inner": ratios_inner,
    "one class": one_class,
    "NMS over all classes": class_agnostic,
    "100 candidates a level": changed(before=100),
    "another threshold": changed(threshold=2.5),
    "another overlap": lambda s: setattr(s, "settings", replace(s.settings, iou=0.6)),
    "sides in the wrong order": lambda s: setattr(s, "corner", s.corner[[1, 0, 1, 0]]),
    "half a pixel": lambda s: setattr(s, "anchors", replace(s.anchors, offset=1 / 16)),
}


@pytest.fixture(scope="module")
def verified(detector):
    """verified(mistake or None) -> Parity of an artifact with it."""
    network = load_checkpoint(detector)
    plan = check_plan(get_target("onnx"), ExportPlan("onnx", imgsz=SIZE, input="tensor"))
    plan, preprocessing = complete(plan, network.spec)
    inputs = make_test_inputs(plan, preprocessing)
    assert isinstance(network.module, nn.Module)

    def check(mistake):
        right, wrong = (network.module.selection(plan.selection, SIZE) for _ in range(2))
        if mistake:
            mistake(wrong)
        expected = Artifact(network.module, right).run({"tensor": inputs})
        access = SimpleNamespace(names=(), in_situ=lambda feeds: [])
        run = FloatRun(inputs, expected, [], {})
        return verify(run, Artifact(network.module, wrong), access, plan, DETECTION, float16=False)

    return check


def test_the_right_selection_is_accepted(verified):
    parity = verified(None)
    assert parity.ok and parity.top1_agreement == 1 and parity.cosine > 0.999999


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_rejected(name, verified):
    assert not verified(MISTAKES[name]).ok


# ------------------------------------------------------------------------------------------------------- refusals


def completed(path, target="onnx", **settings):
    network = load_checkpoint(path)
    return complete(check_plan(get_target(target), ExportPlan(target, **settings)), network.spec)


def test_settings_come_from_flags_then_the_file_then_the_target(detector):
    plan, preprocessing = completed(detector, imgsz=SIZE, iou=0.7)
    assert plan.selection == SelectionSettings(0.05, 0.7, 100, "graph")
    assert (preprocessing.resize, preprocessing.interpolation) == ("pad", "bilinear-opencv")
    assert completed(detector, "trt-rtx", imgsz=SIZE)[0].nms == "none"
    assert completed(detector, "trt", imgsz=SIZE, nms="none")[0].nms == "none"


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("trt-rtx", {"nms": "graph"}, "--nms graph: target 'trt-rtx' cannot run it; it has: none"),
        ("coreml", {"more_imgsz": ((64, 64),), "min_target": "iOS18"}, "several --imgsz"),
        ("onnx", {"head": "probs"}, "--head probs: retina_micro gives detections"),
        ("onnx", {"labels": ("a", "b")}, "2 labels for a head of 5 classes"),
    ],
)
def test_impossible_plans_are_refused(target, settings, message, detector):
    with pytest.raises(UsageError, match=message):
        completed(detector, target, imgsz=SIZE, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nms": "both"}, "--nms 'both': choose from: graph, none"),
        ({"score_thr": 1}, "--score-thr 1"),
        ({"iou": 0}, "--iou 0"),
        ({"max_det": 0}, "--max-det 0"),
        ({"max_det": 1001}, "--max-det 1001"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        ExportPlan("onnx", **settings)


def test_a_foreign_network_is_no_detector_by_its_name():
    network = Network.of(nn.Conv2d(3, 8, 1), outputs=("map",), task="detection", num_classes=2)
    plan = check_plan(get_target("onnx"), ExportPlan("onnx", imgsz=SIZE))
    with pytest.raises(UsageError, match="has the task detection, but no method `selection`"):
        Source(network).reference(*complete(plan, network.spec))


def test_a_classifier_has_no_selection(micro):
    with pytest.raises(UsageError, match="--max-det: micro_64 is no detector, it gives classification"):
        completed(micro, max_det=5)

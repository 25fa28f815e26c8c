"""OpenVINO Model API opens a detector's IR: its metadata and output, and the package itself where it is installed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.export.openvino.ir import describe, save
from evm_deploy.export.openvino.model_api import add_model_api
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.openvino import OpenVinoRuntime
from evm_deploy.tasks.detection import decode
from evm_deploy.tasks.task import Reading

openvino = pytest.importorskip("openvino")
SIZE = (96, 128)
LABELS = ("traffic light", "自転車", "bus")
OUTPUTS = {
    "boxes": np.float32([[[10, 8, 60, 40], [12, 9, 61, 41], [64, 20, 128, 70], [0, 0, 0, 0]]]),
    "scores": np.float32([[0.9, 0.8, 0.4, 0]]),
    "labels": np.int32([[0, 0, 2, -1]]),
}
GIVEN = {"score_thr": 0.05, "iou": 0.5, "max_det": 100, "labels": LABELS}


def ir(folder, plan, resize="pad"):
    """An IR with constant outputs, whose input is read: the mean of the image is added 0 times."""
    from openvino import opset13 as op

    shape = [1, *SIZE, 3] if plan.input == "image" else [1, 3, *SIZE]
    image = op.parameter(shape, np.uint8 if plan.input == "image" else np.float32, name=plan.input)
    image.output(0).get_tensor().set_names({plan.input})
    nothing = op.multiply(
        op.reduce_mean(op.convert(image, "f32"), op.constant([0, 1, 2, 3])), op.constant(np.float32(0))
    )
    given = {**OUTPUTS, **({"count": np.int32([3])} if plan.nms == "graph" else {})}
    results = []
    for name, value in given.items():
        node = op.add(op.constant(value), op.convert(nothing, "f32" if value.dtype == np.float32 else "i32"))
        node.output(0).get_tensor().set_names({name})
        results.append(op.result(node))
    model = openvino.Model(results, [image], "detector")
    facts = {"preprocessing": json.dumps(Preprocessing(SIZE, resize=resize).as_dict())}
    added = add_model_api(model, plan, facts)
    describe(model, added)
    save(model, folder / "model.xml")
    return folder / "model.xml", added


def info_of(path):
    model = openvino.Core().read_model(path)
    if not model.has_rt_info(["model_info"]):
        return {}
    return {key: model.get_rt_info(["model_info", key]).astype(str) for key in model.get_rt_info(["model_info"]).value}


@pytest.mark.parametrize("nms", ["graph", "none"])
def test_our_runtime_does_not_show_the_output(nms, tmp_path):
    path, added = ir(tmp_path, ExportPlan("openvino", imgsz=SIZE, nms=nms, **GIVEN))
    assert added == {"model_api_outputs": "bboxes"}
    with OpenVinoRuntime(path, RunOptions()) as runtime:
        want = {*OUTPUTS, *(["count"] if nms == "graph" else [])}
        found = runtime.run({"image": np.zeros((1, *SIZE, 3), np.uint8)})
        assert {*runtime.outputs} == want == {*found}
    assert all(np.array_equal(found[name], value) for name, value in OUTPUTS.items())
    names = {output.any_name for output in openvino.Core().read_model(path).outputs}
    assert names == want | {"bboxes"}


def test_the_metadata(tmp_path):
    """In Model API's spelling; for a network of tensors, with mean and std of 0..255."""
    path, _ = ir(tmp_path, ExportPlan("openvino", imgsz=SIZE, nms="none", **GIVEN))
    assert info_of(path) == {
        "model_type": "SSD",
        "confidence_threshold": "0.05",
        "iou_threshold": "0.5",
        "nms_execute": "True",
        "nms_max_predictions": "100",
        "agnostic_nms": "False",
        "resize_type": "fit_to_window",
        "interpolation_mode": "CUBIC",
        "pad_value": "115",
        "reverse_input_channels": "True",
        "labels": "traffic_light 自転車 bus",
    }
    path, _ = ir(tmp_path, ExportPlan("openvino", imgsz=SIZE, input="tensor", nms="graph", **GIVEN), "stretch")
    info = info_of(path)
    assert (info["resize_type"], info["nms_execute"]) == ("standard", "False")
    assert (info["mean_values"], info["scale_values"]) == ("123.675 116.28 103.53", "58.395 57.12 57.375")


@pytest.mark.parametrize(
    ("resize", "changes"),
    [("crop", {"nms": "graph"}), ("pad", {"nms": "graph", "batch": 2}), ("pad", {"head": "features"})],
)
def test_models_that_it_cannot_run_are_left_alone(resize, changes, tmp_path):
    given = {**GIVEN, "nms": "graph", **changes}
    plan = ExportPlan("openvino", imgsz=SIZE, **(given if "head" not in changes else changes))
    path, added = ir(tmp_path, plan, resize)
    assert (added, info_of(path)) == ({}, {})
    assert "bboxes" not in {output.any_name for output in openvino.Core().read_model(path).outputs}


@pytest.mark.parametrize("nms", ["graph", "none"])
@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_the_package_gives_our_detections(nms, resize, tmp_path):
    """Boxes are rounded to whole pixels there, and small ones left out."""
    models = pytest.importorskip("model_api.models", reason="openvino-model-api is not installed")
    path, _ = ir(tmp_path, ExportPlan("openvino", imgsz=SIZE, nms=nms, **GIVEN), resize)
    model = models.Model.create_model(str(path), device="CPU")
    outputs = {**OUTPUTS, **({"count": np.int32([3])} if nms == "graph" else {})}
    for height, width in ((96, 128), (300, 400), (250, 90)):
        found = model(np.zeros((height, width, 3), np.uint8))
        place = Preprocessing(SIZE, resize=resize).geometry(width, height)
        (want,) = decode(outputs, Reading(LABELS, places=[place]))
        # Model API clips to the image; a box that lies in the padding has no area then
        assert found.label_names == [each.label.replace(" ", "_") for each in want]
        assert np.allclose(found.scores, [each.score for each in want])
        assert np.abs(found.bboxes - [each.box for each in want]).max() <= 1

"""Detectors for TensorRT: limits of its layers, and the plugin EfficientNMS_TRT, which ONNX Runtime computes here."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import load
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.export.tensorrt.settings import EngineSettings
from evm_deploy.export.tensorrt.suppression import check_limits, emulate, use_plugin
from evm_deploy.export.tensorrt.target import open_emulator
from evm_deploy.runtimes.base import RunOptions
from evm_deploy.runtimes.onnxruntime import OnnxRuntime

SIZE = (96, 128)
EFFICIENT = EngineSettings(efficient_nms=True)


@pytest.fixture(scope="module")
def efficient(named_detector, bundle_of):
    """A bundle whose graph has the plugin. The export has verified it in ONNX Runtime."""
    return bundle_of(named_detector, ExportPlan("trt", imgsz=SIZE, batch=2, settings=EFFICIENT))


@pytest.mark.slow
def test_the_plugin_gives_the_detections_of_the_operator(efficient, detector_bundles, scenes):
    """Same labels and scores, boxes within the rounding of the shift; rows from count on are 0 with label -1."""
    with load(detector_bundles["graph"].path, scan="portable") as model:
        pixels = np.stack([model.preprocessing.pixels(path) for path in scenes[::3]])
        want = model.run({"image": pixels})
    with open_emulator(efficient.path / "model.onnx", RunOptions()) as runtime:
        assert {*runtime.outputs} == {*want}
        assert [str(each.dtype) for each in runtime.outputs.values()] == ["float32", "float32", "int32", "int32"]
        found = runtime.run({"image": pixels})
    assert found["count"].tolist() == want["count"].tolist() and found["labels"].tolist() == want["labels"].tolist()
    assert np.abs(found["scores"] - want["scores"]).max() < 1e-5
    assert np.abs(found["boxes"] - want["boxes"]).max() < 1e-2
    assert all(np.array_equal(value[0].shape, want[name][0].shape) for name, value in found.items())


@pytest.mark.slow
def test_the_graph_has_the_plugin_and_nothing_of_the_operator(efficient):
    model = onnx.load(efficient.path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("EfficientNMS_TRT") == 1 and not {"NonMaxSuppression", "CumSum", "ScatterElements"} & {*kinds}
    (node,) = (node for node in model.graph.node if node.op_type == "EfficientNMS_TRT")
    assert node.domain == "TRT" and {each.name: helper.get_attribute_value(each) for each in node.attribute} == {
        "plugin_version": b"1",
        "plugin_namespace": b"",
        "background_class": -1,
        "score_activation": 0,
        "box_coding": 0,
        "max_output_boxes": 100,
        "iou_threshold": 0.5,
        "score_threshold": 0.0,
    }
    assert not model.functions and [value.name for value in model.graph.output] == [
        "boxes",
        "scores",
        "labels",
        "count",
    ]
    read = {name for node in model.graph.node for name in node.input}
    assert all(tensor.name in read for tensor in model.graph.initializer)
    assert "efficient_nms" not in (efficient.path / "build.json").read_text()


def suppression(candidates, most=5, classes=3, k=None):
    """A graph of boxes, scores and labels to a NonMaxSuppression, and a TopK."""
    k = k or min(candidates, 10)
    inputs = [
        helper.make_tensor_value_info("shifted", TensorProto.FLOAT, ["b", candidates, 4]),
        helper.make_tensor_value_info("wide", TensorProto.FLOAT, ["b", 1, candidates]),
    ]
    constants = {"most": np.array([most]), "iou": np.float32([0.5]), "least": np.float32([0]), "k": np.array([k])}
    nodes = [
        helper.make_node("NonMaxSuppression", ["shifted", "wide", "most", "iou", "least"], ["rows"]),
        helper.make_node("TopK", ["wide", "k"], ["values", "scores"], axis=2),
        *(helper.make_node("Identity", ["rows"], [name]) for name in ("boxes", "labels", "count")),
    ]
    kinds = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "labels": TensorProto.INT32}
    shapes = {"boxes": ["b", most, 4], "scores": ["b", most], "labels": ["b", most]}
    outputs = [helper.make_tensor_value_info(name, kind, shapes[name]) for name, kind in kinds.items()]
    outputs.append(helper.make_tensor_value_info("count", TensorProto.INT32, ["b"]))
    graph = helper.make_graph(
        nodes, "nms", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_limits_of_the_layers():
    check_limits(suppression(5000, k=3840))
    with pytest.raises(UsageError, match="6000 candidates of an image reach the NMS, TensorRT's INMSLayer takes 5000"):
        check_limits(suppression(6000))
    with pytest.raises(UsageError, match="best 4000 of a level, TensorRT's TopK at most 3840"):
        check_limits(suppression(5000, k=4000))


def test_images_of_a_batch_are_apart_and_may_be_empty():
    """Two boxes of a class overlap, the same box of another class stays; a second image has none."""
    model = suppression(4)
    assert use_plugin(model, (30, 40)) == 1 and emulate(model)
    boxes = np.float32([[0, 0, 20, 20], [1, 0, 20, 20], [0, 0, 20, 20], [0, 0, 40, 30]])
    labels = np.float32([0, 0, 2, 1])
    shifted = np.stack([boxes + 41 * labels[:, None]] * 2)
    scores = np.float32([[[0.9, 0.8, 0.7, 0.95]], [[-1, -1, -1, -1]]])
    with OnnxRuntime(model.SerializeToString()) as runtime:
        found = runtime.run({"shifted": shifted, "wide": scores})
    assert found["count"].tolist() == [3, 0]
    assert found["labels"].tolist() == [[1, 0, 2, -1, -1], [-1] * 5]
    assert np.array_equal(found["boxes"][0], [*boxes[[3, 0, 2]], [0] * 4, [0] * 4]) and not found["boxes"][1].any()
    assert np.allclose(found["scores"], [[0.95, 0.9, 0.7, 0, 0], [0] * 5])


def test_plans_that_it_is_not_for(micro, tmp_path):
    from evm_deploy.export.pipeline import export

    with pytest.raises(UsageError, match="TensorRT-RTX has no --efficient-nms"):
        check_plan(get_target("trt-rtx"), ExportPlan("trt-rtx", settings=EFFICIENT))
    with pytest.raises(UsageError, match="there is no NMS in the graph"):
        check_plan(get_target("trt"), ExportPlan("trt", nms="none", settings=EFFICIENT))
    with pytest.raises(UsageError, match="--efficient-nms: the network has no NMS"):
        export(micro, ExportPlan("trt", imgsz=(64, 64), settings=EFFICIENT), tmp_path)

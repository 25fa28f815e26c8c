"""ONNX files without loops: what is in them, what is refused, and other runtimes that take them."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.demo import CHECKPOINT, CHECKPOINTS
from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export.hub import unroll
from evm_deploy.export.hub.graph import Graph, check
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import STEPS
from evm_deploy.runtimes.base import Batch
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan import onnx_function, reference, unrolled
from tests.other_runtimes import RUNTIMES
from tests.test_native import random_scan
from tests.toolchains import need

UNROLLED = {"imgsz": (64, 64), "scan": "unrolled"}


@pytest.fixture(scope="module")
def bundle(micro, bundle_of):
    return bundle_of(micro, ExportPlan("onnx", **UNROLLED, opset=18))


def graph_of(bundle):
    model = onnx.load(bundle.path / "model.onnx")
    check(model)
    return model


def assert_loop_free(model):
    """Standard nodes alone, none with a body, every shape known and in the file."""
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert not any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)
    known = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.value_info, *model.graph.output)}
    written = {name for node in model.graph.node for name in node.output if name}
    assert written <= set(known)
    assert all(dim.HasField("dim_value") and dim.dim_value > 0 for name in written for dim in known[name])


def test_standard_ops_without_loops_and_a_manifest_that_says_so(bundle):
    model, manifest = graph_of(bundle), bundle.manifest
    assert_loop_free(model)
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds["Exp"] > 2 and "Gelu" not in kinds and kinds["Erf"]  # opset 18 has no Gelu
    assert [entry.domain for entry in model.opset_import] == [""] and model.opset_import[0].version == 18
    assert manifest.plan["scan"] == "unrolled" and manifest.scan["value"] == "portable"
    assert manifest.scan["reason"].startswith("unrolled, as asked") and manifest.details["nodes"] == kinds.total()
    assert manifest.parity["ok"] and {each["lowering"] for each in manifest.parity["scans"]} == {"portable"}


def test_the_selftest_runs_the_same_form(bundle):
    with load(bundle.path) as model:
        assert model.scan.value == "portable" and all(each.ok for each in model.selftest())
    case = onnx.load(bundle.path / "selftest" / "scan.onnx")
    assert not {"Scan", "Loop", "SelectiveScan"} & {node.op_type for node in case.graph.node} and not case.functions
    with pytest.raises(UsageError, match="exported with portable scans"):
        load(bundle.path, scan="plugin")


@pytest.mark.parametrize("length", [1, 5, STEPS])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_scan_case_takes_shorter_sequences(seed, length):
    inputs = random_scan(seed, 2, 3, length, 5, 7, 1.0)
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("evm", 1)]
    hub = helper.make_model(helper.make_graph(nodes, "hub", *([info] for info in infos)), opset_imports=domains)
    hub.ir_version = 9
    case = unroll.unrolled_alone(hub, STEPS)
    check(case)
    got = OnnxRuntime(case.SerializeToString(), 1).run(dict(zip(onnx_function.INPUTS, inputs, strict=True)))["y"]
    want = reference.selective_scan(*inputs)
    assert got.shape == want.shape and np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.slow
def test_odd_sizes_and_a_fixed_batch(micro, tmp_path):
    made = export(micro, ExportPlan("onnx", "fp16", imgsz=(50, 70), scan="unrolled", batch=3), tmp_path)
    assert_loop_free(graph_of(made))
    with load(made.path) as model:
        assert model.inputs["image"].shape == (3, 50, 70, 3) and all(each.ok for each in model.selftest())


@pytest.mark.slow
def test_a_carry_that_is_wrong_is_rejected(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(unrolled, "_carry", lambda f, end, decay, chunks: f.op("Mul", end, end))
    with pytest.raises(ParityError, match=r"scan layers\.0\.blocks\.0\.op"):
        export(micro, ExportPlan("onnx", **UNROLLED), tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "dynamic"], "static shapes, and --batch dynamic is not one number of images\n  use --batch N, or"),
        (["--batch", "1:2:4"], "static shapes, and --batch 1:2:4 is not"),
        (["--platform", "linux-aarch64"], "with --scan unrolled: the model would not use the library"),
        (["--target", "openvino"], "target 'openvino' has no scan lowering 'unrolled'; it has: auto, plugin, portable"),
    ],
)
def test_what_has_no_unrolled_form_is_refused_at_once(flags, said, micro, tmp_path, capsys):
    flags = ["--target", "onnx", "--scan", "unrolled", "--dry-run", "-q", "-o", str(tmp_path), *flags]
    assert cli.export_main([str(micro), *flags]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def in_a_graph(*nodes, shape=(2, 3)):
    """A hub graph of these nodes, from x to y."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in "xy"]
    graph = helper.make_graph(nodes, "hub", infos[:1], [helper.make_tensor_value_info("y", TensorProto.INT64, None)])
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)).model


def test_shapes_that_depend_on_the_image_are_refused_by_name():
    model = in_a_graph(helper.make_node("NonZero", ["x"], ["y"], name="head/NonZero"))
    with pytest.raises(UsageError, match=r"head/NonZero \(NonZero\) gives a shape that depends(?s:.*)another target"):
        unroll.static(model)


def test_control_flow_is_refused_by_name():
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["h"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 3]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [2, 3]),
        ],
    )
    count = helper.make_node("Constant", [], ["n"], name="count", value_int=3)
    loop = helper.make_node("Loop", ["n", "", "x"], ["y"], name="blocks/Loop", body=body)
    with pytest.raises(UsageError, match=r"blocks/Loop \(Loop\) is control flow"):
        unroll.static(in_a_graph(count, loop))


@pytest.mark.slow
def test_a_detector_gives_its_candidates(tmp_path):
    plan = {"scan": "unrolled", "input": "tensor"}
    with pytest.raises(UsageError, match=r"selection/NonMaxSuppression(?s:.*)--nms none"):
        export(CHECKPOINTS["detector"], ExportPlan("onnx", **plan), tmp_path)
    made = export(CHECKPOINTS["detector"], ExportPlan("onnx", **plan, nms="none"), tmp_path)
    assert_loop_free(graph_of(made))
    with load(made.path) as model:
        assert all(each.ok for each in model.selftest())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "w8"])
def test_quantised_layers_around_float_scans(precision, tmp_path):
    calib = {"calib": "demo", "calib_images": 100, "smooth": "off"} if precision == "int8" else {}
    made = export(CHECKPOINT, ExportPlan("onnx", precision, **UNROLLED, **calib), tmp_path)
    model = graph_of(made)
    assert_loop_free(model)
    inside = [node for node in model.graph.node if "/SelectiveScan" in node.name]
    assert inside and not any("QuantizeLinear" in node.op_type for node in inside)
    assert any(tensor.data_type == TensorProto.INT8 for tensor in model.graph.initializer)
    with load(made.path) as loaded:
        assert all(each.ok for each in loaded.selftest())


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.slow
def test_another_runtime_computes_the_same(runtime, bundle, tmp_path):
    need(runtime)
    run = RUNTIMES[runtime](bundle.path / "model.onnx", tmp_path)
    with load(bundle.path, threads=1) as model:
        for seed in range(2):
            value = np.random.default_rng(seed).integers(0, 256, (1, 64, 64, 3), np.uint8)
            want = model.run({"image": value})["logits"]
            assert np.abs(run(value)["logits"] - want).max() <= 1e-5 * max(1.0, np.abs(want).max())
    assert model.manifest.batch == Batch(1, 1, 1)

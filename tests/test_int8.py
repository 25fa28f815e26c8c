"""INT8 exports: what is quantised, how accurate it is, the gate and how blocks kept in float recover it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from PIL import Image

from evm_deploy import cli
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.calib import quantize, table
from evm_deploy.calib.candidate import QuantizationCandidate
from evm_deploy.calib.evaluate import Accuracy, compare_outputs, keep_float_until
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.int8 import candidates
from evm_deploy.calib.layers import Layer, activations, quantizable_layers
from evm_deploy.calib.quantize import insert_qdq
from evm_deploy.calib.table import CalibrationTable
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import AccuracyError, BundleError, CalibrationError, UsageError
from evm_deploy.export.hub.fuse import fuse_module
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from evm_deploy.tasks.classification import CLASSIFICATION
from evm_deploy.tasks.raw import FEATURES
from tests.test_fused import hub


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """No table of another test or run is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture
def shared_tables(monkeypatch, tables):
    """Tables of other tests of this module that ask for it are found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tables))


def plan(calib, **changes):
    """Not smoothed: that is calibrated and evaluated in tests of its own."""
    return ExportPlan("onnx", **{"precision": "int8", "calib": str(calib), "smooth": "off", **changes})


def fake_ranges(found):
    return {key: Range(-4, 4) for key in activations(found).values()}


def test_every_layer_but_the_first_the_last_and_the_scans_projections(micro):
    graph, _ = hub(micro)
    found = candidates(graph.model, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
    modules = [layer.module for layer in found if not layer.weight_only]
    assert [layer.module for layer in found if layer.weight_only] == ["classifier.head"]
    assert "patch_embed.0" not in modules and "classifier.head" not in modules
    assert not any(module.endswith(".op") for module in modules)  # x_proj, dt_proj
    for part in ("layers.0.blocks.0.op.in_proj", "layers.2.1.conv_dw.0", "layers.3.1.se.conv_reduce"):
        assert part in modules


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (7, 64)])
def test_x_proj_becomes_int8_where_a_block_is_one_op(bits, largest, micro):
    """A scale for each direction and column, and the values of Q/DQ around a product of rounded u and weights."""
    graph, _ = hub(micro)
    found = candidates(graph.model, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY, fuses=True)
    without = candidates(graph.model, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
    added = [layer for layer in found if layer not in without]
    assert [layer.module for layer in added] == [f"{path}.op" for path in graph.fusable]
    assert [layer for layer in found if layer in without] == without and all(layer.stacked for layer in added)
    ranges = {key: Range(-1, 2) for key in activations(added).values()}
    model = insert_qdq(graph.model, added, ranges, weight_bits=bits)
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.model.graph.initializer}
    for layer, op in zip(added, graph.fusable.values(), strict=True):
        assert layer.weight == op.constants["x_proj"] and layer.weight not in constants
        weight, stored = floats[layer.weight], constants[f"{layer.weight}_quantized"]
        scale = np.abs(weight).max(1, keepdims=True) / np.float32(largest)
        np.testing.assert_array_equal(stored, np.rint(weight / scale))
        assert np.abs(stored).max() == largest
        np.testing.assert_array_equal(constants[f"{layer.weight}_scale"], scale)
        assert constants[f"{layer.module}/input_zero_point"] == 85
        np.testing.assert_allclose(constants[f"{layer.module}/input_scale"], 3 / 255, rtol=1e-6)
    both = insert_qdq(graph.model, found, fake_ranges(found))
    for path, op in graph.fusable.items():
        fuse_module(both, path, op)
    assert [node.op_type for node in both.graph.node if node.domain == "evm"] == ["EVSSBlockInt8XProj"] * 2


@pytest.mark.parametrize("symmetric", [False, True])
def test_q_dq_pairs_are_explicit_and_of_the_asked_flavour(symmetric, micro):
    graph, _ = hub(micro)
    found = candidates(graph.model, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
    model = insert_qdq(graph.model, found, fake_ranges(found), symmetric=symmetric)
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    kinds = {constants[node.input[2]].dtype for node in pairs}
    zeros = {int(constants[node.input[2]]) for node in pairs}
    assert kinds == {np.dtype(np.int8 if symmetric else np.uint8)}
    assert zeros == {0} if symmetric else zeros <= set(range(256))
    weights = [a for name, a in constants.items() if a.dtype == np.int8 and a.ndim in (2, 4)]
    assert len(weights) == len({layer.weight for layer in found})
    scan = next(node for node in model.graph.node if node.op_type == "SelectiveScan")
    by_output = {name: node for node in model.graph.node for name in node.output}
    touching = [by_output[name].op_type for name in scan.input if name in by_output]
    readers = [node.op_type for node in model.graph.node if scan.output[0] in node.input]
    assert not {"DequantizeLinear", "QuantizeLinear"} & {*touching, *readers}
    names = [node.name for node in model.graph.node]
    assert all(names) and model.functions


def gated(gate="Sigmoid", axes=(-2, -1), shown=False, relu=True):
    """A convolution, a squeeze-excite gate and a convolution, in float32. shown: the gated tensor is an output."""
    g, constants, nodes = np.random.default_rng(0), [numpy_helper.from_array(np.array(axes, np.int64), "axes")], []

    def convolution(name, x, out_in, size=1):
        weight = g.standard_normal((*out_in, size, size)).astype(np.float32) / (out_in[1] * size * size) ** 0.5
        constants.extend([numpy_helper.from_array(weight, f"{name}.weight")])
        constants.extend([numpy_helper.from_array(g.standard_normal(out_in[0]).astype(np.float32), f"{name}.bias")])
        padding = {"pads": [size // 2] * 4}
        inputs = [x, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"{name}/Conv"], name=f"{name}/Conv", **padding))
        return f"{name}/Conv"

    def node(kind, *inputs, **attributes):
        nodes.append(
            helper.make_node(
                kind, list(inputs), [f"se/{kind}{len(nodes)}"], name=f"se/{kind}{len(nodes)}", **attributes
            )
        )
        return nodes[-1].output[0]

    x = convolution("first", "image", (16, 3), 3)
    x = node("Relu", x) if relu else x
    hidden = node("Relu", convolution("reduce", node("ReduceMean", x, "axes", keepdims=1), (4, 16)))
    y = node("Mul", x, node(gate, convolution("expand", hidden, (16, 4))))
    outputs = [convolution("last", y, (8, 16)), *([x] if shown else ())]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 9, 7])
    graph = helper.make_graph(nodes, "gated", [image], values, constants)
    return shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def int8_of(model, images):
    """The model in int8, with the ranges of its activations on these images."""
    found = quantizable_layers(model)
    names = activations(found)
    probed = copy.deepcopy(model)
    probed.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    values = session_of(probed).run(list(names), {"image": images})
    return insert_qdq(
        model, found, {key: Range(min(0, v.min()), v.max()) for key, v in zip(names.values(), values, strict=True)}
    )


def session_of(model, optimised=None):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("relu", [True, False])
def test_squeeze_excite_gates_between_int8_layers_are_computed_in_integers(relu, tmp_path, monkeypatch):
    images = np.random.default_rng(1).standard_normal((3, 3, 9, 7)).astype(np.float32)
    model = gated(relu=relu)
    (want,) = session_of(model).run(None, {"image": images})
    rounded = int8_of(model, images)
    onnx.checker.check_model(rounded, full_check=True)
    (have,) = session_of(rounded, tmp_path / "optimised.onnx").run(None, {"image": images})
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert {"QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearMul"} <= set(kinds)
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 1)  # image and output
    monkeypatch.setattr(quantize, "with_rounded_gates", lambda model: model)
    (float_gate,) = session_of(int8_of(model, images)).run(None, {"image": images})
    errors = [float(np.sqrt(np.mean((y - want) ** 2))) for y in (have, float_gate)]
    assert 0 < errors[1] < 0.05 * want.std() and errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("changes", [{"gate": "HardSigmoid"}, {"axes": (-1,)}, {"axes": (-2,)}, {"shown": True}])
def test_what_is_no_gate_or_is_an_output_keeps_its_values(changes):
    images = np.random.default_rng(1).standard_normal((1, 3, 9, 7)).astype(np.float32)
    kinds = {node.op_type for node in int8_of(gated(**changes), images).graph.node}
    assert "ReduceMean" in kinds and "GlobalAveragePool" not in kinds


@pytest.mark.slow
def test_the_demo_loses_nothing(tmp_path, capsys):
    flags = ["--target", "onnx", "--int8", "--calib", "demo", "--val", "demo", "-o", str(tmp_path)]
    assert cli.export_main(flags) == 0
    out = capsys.readouterr().out
    assert "Accuracy  top-1 99." in out and "as fast as float32 here" in out
    bundle = open_bundle(tmp_path / "evm_digits-onnx-int8-64x64")
    facts, quantization = bundle.manifest.accuracy, bundle.manifest.details["quantization"]
    assert abs(facts["drop"]) <= 0.3 and facts["images"] == 599 and facts["ok"]
    assert (quantization["in_float"], quantization["method"]) == ([], "mse")
    saved = CalibrationTable.from_json((bundle.path / "calibration.json").read_text())
    assert saved.identity == quantization["calibration"]
    assert cli.run_main([str(bundle.path), "--selftest"]) == 0
    with load(bundle.path, scan="portable") as portable, load(bundle.path, scan="plugin") as native:
        pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
        a, b = (runtime.run({"image": pixels})["logits"] for runtime in (portable, native))
        assert np.abs(a - b).max() < 0.3  # roundings that tip over


@pytest.mark.slow
@pytest.mark.parametrize(("method", "smooth"), [("mse", "on")])
def test_the_trained_network_keeps_its_accuracy(method, smooth, trained, glyphs, labelled_glyphs, tmp_path):
    """Images that were not calibrated with. All methods: benchmarks/int8_methods.py."""
    np.savez(tmp_path / "calib.npz", images=glyphs(256, 5000, 64)[0])
    choices = {"calib_method": method, "smooth": smooth, "val": str(labelled_glyphs)}
    wanted = plan(tmp_path / "calib.npz", imgsz=(64, 64), crop_pct=1.0, **choices)
    bundle = export(trained / "evm_tiny_glyphs64.ckpt", wanted, tmp_path)
    assert bundle.manifest.accuracy["drop"] <= 1.0 and bundle.manifest.accuracy["sqnr_db"] > 30


@pytest.mark.slow
@pytest.mark.parametrize(("case", "imgsz"), [("tiny_224", (160, 160)), ("small_224", (128, 128))])
def test_seeded_weights(case, imgsz, checkpoint, images, tmp_path):
    """28 dB on images that were kept back, and under a third of the size of the weights. B, and larger sizes:
    benchmarks/int8_seeded.py.
    """
    bundle = export(checkpoint(case), plan(images, imgsz=imgsz), tmp_path)
    assert bundle.manifest.accuracy["sqnr_db"] >= 28
    assert bundle.size_bytes < 0.31 * 4 * bundle.manifest.model["parameters"]


@pytest.mark.parametrize(
    "changes", [{"batch": Batch.parse("dynamic")}, {"batch": Batch(2, 2, 2), "input": "tensor"}, {"head": "features"}]
)
@pytest.mark.slow
def test_batches_inputs_and_heads(changes, micro, images, tmp_path):
    bundle = export(micro, plan(images, imgsz=(64, 64), **changes), tmp_path)
    assert bundle.manifest.accuracy["sqnr_db"] > 20
    assert bundle.manifest.parity["ok"]


def spoil(monkeypatch, key):
    """The range of one activation, a fiftieth of what it should be."""
    original = CalibrationTable.ranges

    def spoilt(self, method):
        ranges = original(self, method)
        ranges[key] = Range(ranges[key].low / 50, ranges[key].high / 50)
        return ranges

    monkeypatch.setattr(CalibrationTable, "ranges", spoilt)


@pytest.mark.slow
def test_a_spoilt_range_exits_5(monkeypatch, micro, images, tmp_path, capsys):
    spoil(monkeypatch, "layers.2.1.conv_dw.0:input")
    flags = ["--target", "onnx", "--int8", "--imgsz", "64", "--calib", str(images), "-o", str(tmp_path), "-q"]
    assert cli.export_main([str(micro), *flags]) == 5
    assert "int8 is not accurate enough (at least 20 dB): same answers" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["micro_64-onnx-int8-64x64.rejected"]
    with pytest.raises(BundleError, match="was rejected"):
        open_bundle(next(tmp_path.iterdir()))


@pytest.mark.slow
def test_max_drop_recovers_by_keeping_the_spoilt_block_in_float(shared_tables, monkeypatch, tmp_path):
    spoil(monkeypatch, "layers.3.1.conv_pw2.0:input")
    bundle = export(CHECKPOINT, plan("demo", val="demo", max_drop=0.3), tmp_path)
    quantization = bundle.manifest.details["quantization"]
    assert quantization["in_float"] == ["layers.3.1"]
    assert min(quantization["sensitivity_sqnr_db"], key=quantization["sensitivity_sqnr_db"].get) == "layers.3.1"
    assert bundle.manifest.accuracy["drop"] <= 0.3


@pytest.mark.slow
def test_a_block_with_a_scan_can_stay_in_float(shared_tables, monkeypatch, tmp_path):
    spoil(monkeypatch, "layers.1.blocks.0.op.out_proj:input")
    bundle = export(CHECKPOINT, plan("demo", val="demo", max_drop=0.1), tmp_path)
    assert bundle.manifest.details["quantization"]["in_float"] == ["layers.1.blocks.0"]
    model = onnx.load(str(bundle.path / "model.onnx"))
    fused = [node.op_type for node in model.graph.node if node.domain == "evm"]
    assert fused == ["EVSSBlockInt8XProj", "EVSSBlock"]


@pytest.mark.slow
def test_an_impossible_budget_exits_5_with_everything_in_float(shared_tables, monkeypatch, tmp_path):
    monkeypatch.setattr(Accuracy, "ok", property(lambda self: False))
    with pytest.raises(AccuracyError, match="limit 0 points"):
        export(CHECKPOINT, plan("demo", val="demo", max_drop=0), tmp_path)
    manifest = json.loads((next(tmp_path.iterdir()) / "manifest.json").read_text())
    assert manifest["details"]["quantization"]["int8_layers"] == 0


@pytest.mark.slow
def test_a_second_export_reuses_the_table(monkeypatch, micro, images, tmp_path):
    calls = []
    original = CalibrationTable.add
    monkeypatch.setattr(CalibrationTable, "add", lambda self, values: calls.append(1) or original(self, values))
    export(micro, plan(images, imgsz=(64, 64)), tmp_path / "a")
    assert len(calls) == 105
    export(micro, plan(images, imgsz=(64, 64), calib_method="minmax"), tmp_path / "b")
    assert len(calls) == 105
    export(micro, plan(images, imgsz=(64, 64), calib_images=110), tmp_path / "c")
    assert len(calls) > 105


@pytest.mark.slow
def test_an_interrupted_export_keeps_what_was_measured(monkeypatch, micro, images, tmp_path):
    original = CalibrationTable.add

    def interrupted(self, values):
        if self.done == 70:
            raise KeyboardInterrupt
        original(self, values)

    monkeypatch.setattr(CalibrationTable, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(micro, plan(images, imgsz=(64, 64)), tmp_path)
    assert not list(tmp_path.iterdir())
    seen = []
    monkeypatch.setattr(CalibrationTable, "add", lambda self, values: seen.append(self.done) or original(self, values))
    export(micro, plan(images, imgsz=(64, 64)), tmp_path)
    assert seen[0] == 70 // table.SAVE_EVERY * table.SAVE_EVERY


MEMORY = """
import resource, sys
from evm_deploy.export import ExportPlan, export
plan = ExportPlan("onnx", precision="int8", imgsz=(128, 128), calib=sys.argv[2], force_calib=True)
export(sys.argv[1], plan, sys.argv[3])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_depend_on_the_number_of_images(micro, tmp_path):
    peaks = []
    for count in (16, 144):
        np.savez(tmp_path / f"{count}.npz", images=np.stack([synthetic_image(128, 128, seed=i) for i in range(count)]))
        command = [sys.executable, "-c", MEMORY, str(micro), str(tmp_path / f"{count}.npz"), str(tmp_path / str(count))]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 60  # MB; the activations of 128 images are hundreds


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("layers.2.1.conv_pw.0", "layers.2.1"),
        ("layers.0.blocks.0.op.in_proj", "layers.0.blocks.0"),
        ("layers.0.downsample.reduction", "layers.0.downsample"),
        ("layers.2.0.reduction", "layers.2.0"),
        ("classifier.head", "classifier"),
    ],
)
def test_blocks_are_the_units_that_stay_in_float(module, block, micro):
    """A module that the spec does not name falls back with the first part of its path."""
    source = QuantizationCandidate(None, [], load_checkpoint(micro).spec.blocks)
    assert source.block_of(Layer("", module, "", "", "")) == block


def test_an_activation_between_two_blocks_has_a_range_whichever_of_them_is_quantised():
    first, second = Layer("a", "a.conv", "x", "y", "w"), Layer("b", "b.conv", "y", "z", "v")
    ranges = {key: Range(-1.0, i + 1.0) for i, key in enumerate(sorted(set(activations([first, second]).values())))}
    assert "a.conv:output" not in ranges
    source = QuantizationCandidate(
        None, [first, second], ["a", "b"], ranges=ranges, rewrite=lambda model, layers, ranges: (layers, ranges)
    )
    for blocks in (["a"], ["b"], ["a", "b"]):
        chosen, found = source.quantized(blocks)
        assert {tensor: found[key] for tensor, key in activations(chosen).items() if tensor == "y"} == {
            "y": ranges["b.conv:input"]
        }


def test_figures_of_accuracy():
    g = np.random.default_rng(0)
    scores = g.standard_normal((50, 10)).astype(np.float32)
    labels = scores.argmax(1)
    reference, noisy = {"logits": scores}, {"logits": (scores + 0.01 * g.standard_normal((50, 10))).astype(np.float32)}
    same = compare_outputs(reference, noisy, CLASSIFICATION, labels, limit=1.0)
    assert same.float_scores == {"top1": 1.0, "top5": 1.0} and same.ok
    assert same.sqnr_db == pytest.approx(40, abs=1)
    wrong = compare_outputs(reference, {"logits": -scores}, CLASSIFICATION, labels, limit=1.0)
    assert wrong.drop == 100 and not wrong.ok and wrong.agreement == 0
    assert not compare_outputs(reference, {"logits": np.full_like(scores, np.nan)}, CLASSIFICATION).ok
    assert compare_outputs(reference, noisy, FEATURES).agreement is None
    assert Accuracy.from_dict(wrong.as_dict()) == wrong and wrong.as_dict()["top1_float"] == 1.0


def test_blocks_are_kept_in_float_only_as_long_as_needed():
    def evaluate(kept):
        return Accuracy(10, 30.0, 1.0, {"top1": 0.9 + 0.03 * len(kept)}, {"top1": 1.0}, "top1", limit=5.0)

    kept, accuracy = keep_float_until(evaluate, ["c", "a", "b", "d"])
    assert kept == {"c", "a"} and accuracy.ok
    kept, accuracy = keep_float_until(
        lambda kept: Accuracy(1, 0.0, 0.0, {"top1": 0.0}, {"top1": 1.0}, "top1", limit=1.0), ["a"]
    )
    assert kept == {"a"} and not accuracy.ok


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calib": None}, "int8 needs images to calibrate with(?s:.*)--calib DIR"),
        ({"max_drop": 1.0}, "--max-drop needs labelled images(?s:.*)--val"),
        ({"calib_method": "median"}, "choose from: minmax, percentile, mse, entropy, auto"),
        ({"calib_images": 0}, "use a number from 1"),
        ({"val": "v", "max_drop": -1.0}, "points of accuracy"),
        ({"val": "v", "head": "features"}, "feature maps have no classes"),
        ({"precision": "fp32"}, "--calib is for int8 and w8, this export is fp32"),
        ({"precision": "w8", "val": "v"}, "--calib has no use for w8 beside --val(?s:.*)leave --calib out"),
        ({"precision": "w8", "max_drop": 1.0}, "--max-drop needs labelled images(?s:.*)--val"),
    ],
)
def test_plans_that_cannot_work(changes, message):
    with pytest.raises(UsageError, match=message):
        ExportPlan(**{"target": "onnx", "precision": "int8", "calib": "c", **changes})


@pytest.mark.slow
def test_unfit_images_leave_nothing_behind(micro, tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    Image.fromarray(synthetic_image(40, 40, seed=0)).save(source / "one.png")
    with pytest.raises(CalibrationError, match="too few"):
        export(micro, plan(source, imgsz=(64, 64)), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    forced = export(micro, plan(source, imgsz=(64, 64), force_calib=True), tmp_path / "out")
    assert forced.manifest.details["quantization"]["calibration"]["images"]["count"] == 1

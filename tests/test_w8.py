"""w8 exports: weights alone are int8; the runtime restores them once, and the network is as fast as the float one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from evm_deploy import cli
from evm_deploy.bundle import selftest
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.calib import int8
from evm_deploy.calib.int8 import candidates
from evm_deploy.calib.quantize import insert_qdq
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export.hub.naming import below
from evm_deploy.export.onnx import TARGET
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.runtimes.base import Batch, RunOptions
from evm_deploy.sweep.forms import Form, parse_forms
from tests.test_fused import hub


def plan(**changes):
    return ExportPlan("onnx", **{"precision": "w8", **changes})


def constants(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.fixture(scope="module")
def bundle(micro, bundle_of):
    return bundle_of(micro, plan(imgsz=(64, 64)))


def test_w8a16_is_another_name_of_w8():
    assert plan(precision="w8a16") == plan(precision="w8")
    assert parse_forms("onnx:w8a16,onnx:w8") == (Form("onnx", "w8"),)
    with pytest.raises(UsageError, match="'w8a8' is unknown"):
        plan(precision="w8a8")


def test_w8a16_from_the_command_line(tmp_path, capsys):
    for flags in (["--target", "onnx"], ["--device", "pi5"]):
        assert cli.export_main([*flags, "--precision", "w8a16", "--dry-run", "-o", str(tmp_path)]) == 0
        assert "-> ONNX w8, 64x64" in capsys.readouterr().out


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_are_the_same_to_half_a_step_and_nothing_else_changes(symmetric, micro):
    graph, _ = hub(micro)
    found = candidates(graph.model, "w8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
    model = insert_qdq(graph.model, found, {}, symmetric=symmetric)
    onnx.checker.check_model(model, full_check=True)
    before, after = constants(graph.model), constants(model)
    weights = {layer.weight: layer.module for layer in found}
    assert {name for name in before if name not in after} == set(weights)
    assert all(np.array_equal(after[name], value) for name, value in before.items() if name not in weights)
    for name, module in weights.items():
        stored, scale = after[f"{name}_quantized"], after[f"{name}_scale"]
        reader = next(node for node in model.graph.node if name in node.input)
        channels = -1 if reader.op_type == "MatMul" else 0
        shape = [1] * stored.ndim
        shape[channels] = -1
        scale = scale.reshape(shape)
        error = np.abs(stored * scale - before[name])
        assert stored.dtype == np.int8 and scale.size == stored.shape[channels]
        assert (error <= 0.51 * scale).all() and np.abs(stored).max() == 127
        assert reader.name.startswith(f"{module}/")
    added = [
        node for node in model.graph.node if node.op_type not in Counter(n.op_type for n in graph.model.graph.node)
    ]
    assert {node.op_type for node in added} <= {"DequantizeLinear"} and len(added) == symmetric * len(weights)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all("/" in name for name in names)


def test_every_layer_but_the_first_and_those_in_blocks_with_a_scan(micro):
    graph, _ = hub(micro)
    modules = [layer.module for layer in candidates(graph.model, "w8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)]
    assert "patch_embed.0" not in modules
    assert not any(below(path, module + "/") for path in graph.fusable for module in modules)
    for part in (
        "layers.2.1.conv_dw.0",
        "layers.3.1.se.conv_reduce",
        "layers.0.downsample.reduction",
        "classifier.head",
    ):
        assert part in modules


def optimised(model, path):
    """The operators of `model` as ONNX Runtime runs it, by type."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def test_onnxruntime_restores_the_weights_when_it_loads(bundle, micro, micro_bundle, tmp_path):
    """With no session option: its optimised graph is that of float32. DequantizeLinear it would keep."""
    w8, float32 = (onnx.load(str(b.path / "model.onnx")) for b in (bundle, micro_bundle))
    layers = len([tensor for tensor in w8.graph.initializer if tensor.data_type == onnx.TensorProto.INT8])
    assert layers == bundle.manifest.details["quantization"]["int8_layers"] == 14
    assert len(w8.graph.node) == len(float32.graph.node) + 2 * layers
    assert optimised(w8, tmp_path / "w8.onnx") == optimised(float32, tmp_path / "fp32.onnx")
    graph, _ = hub(micro)
    dequantized = insert_qdq(
        graph.model, candidates(graph.model, "w8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY), {}, symmetric=True
    )
    assert optimised(dequantized, tmp_path / "dq.onnx")["DequantizeLinear"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("tiny_224", 160), ("small_224", 128), ("base_224", 128)])
def test_seeded_weights(name, side, checkpoint, images, tmp_path):
    wanted = plan(imgsz=(side, side), calib=str(images), calib_images=24, force_calib=True)
    manifest = export(checkpoint(name), wanted, tmp_path).manifest
    assert manifest.accuracy["sqnr_db"] >= 28 and manifest.accuracy["images"] == 24
    assert manifest.details["quantization"]["size_of_fp32"] <= 0.30
    assert manifest.parity["max_abs"] < 0.25 * manifest.parity["limit"]


@pytest.mark.slow
def test_the_trained_network_keeps_its_accuracy(trained, labelled_glyphs, tmp_path):
    wanted = plan(imgsz=(64, 64), crop_pct=1.0, val=str(labelled_glyphs), max_drop=0.5)
    bundle = export(trained / "evm_tiny_glyphs64.ckpt", wanted, tmp_path)
    quantization = bundle.manifest.details["quantization"]
    assert bundle.manifest.accuracy["drop"] <= 0.5 and bundle.manifest.accuracy["sqnr_db"] > 35
    assert quantization["in_float"] == [] and quantization["size_of_fp32"] <= 0.30
    with load(bundle.path) as ours:
        pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
        plain = ort.InferenceSession(str(bundle.path / "model.onnx"), providers=["CPUExecutionProvider"])
        assert np.abs(ours.run({"image": pixels})["logits"] - plain.run(None, {"image": pixels})[0]).max() < 1e-3


@pytest.mark.slow
def test_the_command_needs_no_images_and_takes_labelled_ones(tmp_path, capsys):
    flags = ["--target", "onnx", "--precision", "w8", "-o", str(tmp_path), "-q"]
    path = tmp_path / "evm_digits-onnx-w8-64x64"
    assert cli.export_main(flags) == 0
    out = capsys.readouterr().out
    assert "w8 is " in out and "as fast as float32 here (1 thread), 0.3" in out and "Accuracy" not in out
    assert open_bundle(path).manifest.accuracy is None
    assert cli.export_main([*flags, "--val", "demo", "--force"]) == 0
    assert "Accuracy  top-1 99." in capsys.readouterr().out
    bundle = open_bundle(path)
    quantization = bundle.manifest.details["quantization"]
    assert abs(bundle.manifest.accuracy["drop"]) <= 0.3 and bundle.manifest.accuracy["limit"] == 1.0
    assert not {"calibration", "method"} & set(quantization) and not (path / "calibration.json").exists()
    assert bundle.manifest.notes == []  # slower than 1.05x float32, and that is no fault
    assert cli.run_main([str(path), "--selftest"]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": Batch.parse("dynamic"), "opset": 18},
        {"batch": Batch(2, 2, 2), "input": "tensor"},
        {"head": "features"},
        {"scan": "portable"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_batches_inputs_heads_and_scans(changes, micro, tmp_path):
    bundle = export(micro, plan(imgsz=(64, 64), **changes), tmp_path)
    assert bundle.manifest.parity["max_abs"] < 0.5 * bundle.manifest.parity["limit"]
    with load(bundle.path, scan="portable") as model:
        assert all(check.ok for check in model.selftest())


def test_the_self_test_tells_w8_from_float(bundle, micro_bundle):
    """The expected outputs are the artifact's own, computed in float: other weights fail."""
    for other, ok in ((bundle, True), (micro_bundle, False)):
        with TARGET.runtime.open(other.path / "model.onnx", RunOptions(threads=1)) as runtime:
            checks = {check.name: check.ok for check in selftest.run(bundle, TARGET.runtime, runtime, RunOptions())}
        assert checks["logits"] is ok


@pytest.fixture
def spoil(monkeypatch):
    """spoil(module): the scale of a weight is four times what it should be."""

    def install(module):
        def spoilt(model, found, ranges, **how):
            result = insert_qdq(model, found, ranges, **how)
            for layer in found:
                if layer.module == module:
                    scale = next(t for t in result.graph.initializer if t.name == f"{layer.weight}_scale")
                    scale.CopyFrom(numpy_helper.from_array(4 * numpy_helper.to_array(scale), scale.name))
            return result

        monkeypatch.setattr(int8, "insert_qdq", spoilt)

    return install


def test_without_images_parity_is_the_gate(spoil, micro, tmp_path):
    spoil("layers.2.1.conv_pw2.0")
    with pytest.raises(ParityError, match=r"logits differ by"):
        export(micro, plan(imgsz=(64, 64)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["micro_64-onnx-w8-64x64.rejected"]


def test_images_without_labels_exit_5(spoil, micro, images, tmp_path, capsys):
    spoil("layers.2.1.conv_pw2.0")
    flags = ["--target", "onnx", "--precision", "w8", "--imgsz", "64", "--tol", "0.9", "-o", str(tmp_path), "-q"]
    assert cli.export_main([str(micro), *flags, "--calib", str(images)]) == 5
    assert "w8 is not accurate enough (at least 20 dB): same answers" in capsys.readouterr().err


@pytest.mark.slow
def test_max_drop_recovers_by_keeping_the_spoilt_block_in_float(spoil, tmp_path):
    spoil("layers.3.1.conv_pw2.0")
    bundle = export(CHECKPOINT, plan(val="demo", max_drop=0.3), tmp_path)
    quantization = bundle.manifest.details["quantization"]
    assert quantization["in_float"] == ["layers.3.1"]
    assert min(quantization["sensitivity_sqnr_db"], key=quantization["sensitivity_sqnr_db"].get) == "layers.3.1"
    assert bundle.manifest.accuracy["drop"] <= 0.3

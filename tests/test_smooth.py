"""SmoothQuant: factors move exactly or not at all, make channels alike, and save a network with outlier channels."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import cli
from evm_deploy._util.progress import silent
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.calib import smooth as smoothing
from evm_deploy.calib.candidate import make_candidates
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.int8 import candidates
from evm_deploy.calib.smooth import fold, smooth, smooth_groups
from evm_deploy.calib.table import CalibrationTable
from evm_deploy.data.images import calibration_images
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import UsageError
from evm_deploy.export.hub.fuse import match_constants
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan.fused import FusedOp
from evm_deploy.tasks.raw import RAW
from tests.test_fused import hub

CHANNELS, SIDE = 4, 6


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """No table of another test or run is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def plan(calib, **changes):
    return ExportPlan("onnx", **{"precision": "int8", "calib": str(calib), "smooth": "on", **changes})


def graph(*steps, outputs=()):
    """x -> Conv(w1, b1) -> a -> `steps`, (op, inputs, output, attributes) each, the last one to y."""
    rng = np.random.default_rng(0)
    dense = (CHANNELS, CHANNELS, 1, 1)
    shapes = {"w1": dense, "b1": (CHANNELS,), "w2": dense, "w3": dense, "half": (CHANNELS, CHANNELS // 2, 1, 1)}
    shapes |= {
        "depthwise": (CHANNELS, 1, 3, 3),
        "matrix": (CHANNELS, 3),
        "side": (SIDE, 3),
        "gate": (1, CHANNELS, 1, 1),
    }
    constants = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    constants += [numpy_helper.from_array(np.array(v), n) for n, v in (("map", [2, 3]), ("channels", [1]))]
    nodes = [helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="producer")]
    for i, (op, inputs, output, *attributes) in enumerate(steps):
        nodes.append(helper.make_node(op, inputs, [output], name=str(i), **dict(*attributes)))
    read = {name for node in nodes for name in node.input}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, SIDE, SIDE])
    ys = [helper.make_empty_tensor_value_info(name) for name in ("y", *outputs)]
    g = helper.make_graph(nodes, "g", [x], ys, [tensor for tensor in constants if tensor.name in read])
    return onnx.shape_inference.infer_shapes(helper.make_model(g, opset_imports=[helper.make_opsetid("", 20)]))


def run(model):
    x = np.random.default_rng(1).standard_normal((1, CHANNELS, SIDE, SIDE)).astype(np.float32)
    return OnnxRuntime(model.SerializeToString(), 1).run({"x": x})["y"]


def random_factors(model, folding, rng):
    """Positive, over three orders of magnitude."""
    first = folding.divide[0]
    size = next(tensor for tensor in model.graph.initializer if tensor.name == first.tensor).dims[first.axis]
    return 10 ** rng.uniform(-1.5, 1.5, size)


LAST = {"perm": [0, 2, 3, 1]}
PASSES = {
    "conv": [("Conv", ["a", "w2"], "y")],
    "relu": [("Relu", ["a"], "r"), ("Conv", ["r", "w2"], "y")],
    "depthwise": [("Relu", ["a"], "r"), ("Conv", ["r", "depthwise"], "y", {"group": CHANNELS})],
    "linear": [("Transpose", ["a"], "t", LAST), ("MatMul", ["t", "matrix"], "y")],
    "gate": [("Mul", ["a", "gate"], "m"), ("Conv", ["m", "w2"], "y")],
    "gate of its own": [
        ("ReduceMean", ["a", "map"], "p", {"keepdims": 1}),
        ("Conv", ["p", "w3"], "c"),
        ("Sigmoid", ["c"], "s"),
        ("Mul", ["a", "s"], "m"),
        ("Conv", ["m", "w2"], "y"),
    ],
    "pooled": [("ReduceMean", ["a", "map"], "p", {"keepdims": 0}), ("MatMul", ["p", "matrix"], "y")],
}
BLOCKED = {
    "an activation function that bends": [("Sigmoid", ["a"], "s"), ("Conv", ["s", "w2"], "y")],
    "a residual": [("Add", ["a", "x"], "s"), ("Conv", ["s", "w2"], "y")],
    "one reader that cannot": [("Conv", ["a", "w2"], "c"), ("Add", ["a", "c"], "y")],
    "its square": [("Mul", ["a", "a"], "m"), ("Conv", ["m", "w2"], "y")],
    "its square by two ways": [("Relu", ["a"], "r"), ("Mul", ["a", "r"], "m"), ("Conv", ["m", "w2"], "y")],
    "a weight that others read": [("Conv", ["a", "w2"], "c"), ("Conv", ["x", "w2"], "d"), ("Add", ["c", "d"], "y")],
    "a producer's weight that others read": [
        ("Conv", ["x", "w1"], "d"),
        ("Conv", ["a", "w2"], "c"),
        ("Add", ["c", "d"], "y"),
    ],
    "a linear layer along another axis": [("MatMul", ["a", "side"], "y")],
    "a mean over channels": [("ReduceMean", ["a", "channels"], "p"), ("MatMul", ["p", "side"], "y")],
    "groups of channels": [("Conv", ["a", "half"], "y", {"group": 2})],
}


@pytest.mark.parametrize("name", PASSES)
def test_factors_move_exactly(name):
    model = graph(*PASSES[name])
    folding = next(each for each in smooth_groups(model) if each.node == "producer")
    before = run(model)
    fold(model, folding, random_factors(model, folding, np.random.default_rng(2)))
    np.testing.assert_allclose(run(model), before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("name", BLOCKED)
def test_factors_stay_where_they_would_not_cancel(name):
    model = graph(*BLOCKED[name])
    assert not [each for each in smooth_groups(model) if each.node == "producer"]
    onnx.checker.check_model(model, full_check=True)


def test_what_is_an_output_stays():
    assert smooth_groups(graph(*PASSES["conv"])) and not smooth_groups(graph(*PASSES["conv"], outputs=["a"]))


def test_channels_become_alike():
    """x / s and w s are then both sqrt(x w) up to one factor."""
    model = graph(*PASSES["relu"])
    largest = np.array([0.01, 1, 100, 0], np.float32)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight = np.abs(weights["w2"]).max(axis=(0, 2, 3))
    assert smooth(model, {"r": largest}) == 1
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    factors = weights["b1"] / after["b1"]
    np.testing.assert_allclose(
        largest[:3] / factors[:3],
        weight[:3] * factors[:3] * (largest[0] / factors[0]) / (weight[0] * factors[0]),
        rtol=1e-5,
    )
    assert factors[3] == 1  # always zero
    np.testing.assert_allclose(np.prod(factors[:3]), 1, rtol=1e-5)
    assert smooth(model, {"another": largest}) == 0


def test_the_networks_own_foldings_keep_its_outputs(micro):
    model = hub(micro)[0].model
    found = smooth_groups(model)
    assert [each.node.rpartition("/")[0].partition(".")[2] for each in found] == [
        *("0.blocks.0.norm", "0.blocks.0.op.out_norm", "0.downsample.norm"),
        *("1.blocks.0.norm", "1.blocks.0.op.out_norm", "1.downsample.norm"),
        *("2.1.conv_pw.0", "2.1.conv_dw.0", "2.1.se.conv_reduce", "2.3.norm"),
        *("3.1.conv_pw.0", "3.1.conv_dw.0", "3.1.se.conv_reduce"),
    ]  # fmt: skip
    pixels = {"image": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)}
    before = OnnxRuntime(model.SerializeToString(), 1).run(pixels)["logits"]

    def error(chosen):
        """Largest difference of the logits, relative, after random factors."""
        rng, changed = np.random.default_rng(3), copy.deepcopy(model)
        for each in chosen:
            fold(changed, each, random_factors(model, each, rng))
        return (
            np.abs(OnnxRuntime(changed.SerializeToString(), 1).run(pixels)["logits"] - before).max()
            / np.abs(before).max()
        )

    assert error(found) < 1e-5
    assert all(error([replace(each, multiply=each.multiply[1:])]) > 1e-3 for each in found)  # a weight forgotten


def with_outliers(micro, folder, factor=12.0):
    """The same network, but some channels of some activations are `factor` times as large."""
    saved = torch.load(micro, weights_only=True)
    state = saved["state_dict"]
    for path in ("layers.0.blocks.0", "layers.1.blocks.0"):
        prefix = f"module.module.{path}."
        for name, index, by in (
            *((f"norm.{name}", (slice(0, 2),), factor) for name in ("weight", "bias")),
            ("op.in_proj.weight", (slice(None), slice(0, 2)), 1 / factor),
            ("conv_branch.0.weight", (slice(0, 2),), 1 / factor),
            *((f"op.out_norm.{name}", (slice(0, 2),), factor) for name in ("weight", "bias")),
            ("op.out_proj.weight", (slice(None), slice(0, 2)), 1 / factor),
        ):
            state[prefix + name][index] *= by
    torch.save(saved, folder / "outliers.ckpt")
    return folder / "outliers.ckpt"


@pytest.mark.slow
def test_a_network_with_outlier_channels_is_saved_and_auto_sees_it(micro, images, tmp_path):
    checkpoint, sqnr = with_outliers(micro, tmp_path), {}
    for choice in ("off", "on", "auto"):
        made = export(
            checkpoint, plan(images, imgsz=(64, 64), smooth=choice, weight_bits=7), tmp_path / choice
        ).manifest
        sqnr[choice] = made.accuracy["sqnr_db"]
    assert sqnr["on"] > sqnr["off"] + 6 and sqnr["auto"] == sqnr["on"]
    assert made.details["quantization"]["smooth"] == {
        "value": "on",
        "reason": f"SQNR {sqnr['on']:.1f} dB; off SQNR {sqnr['off']:.1f} dB",
    }


@pytest.mark.slow
def test_auto_leaves_smoothing_out_where_it_hurts(monkeypatch, micro, images, tmp_path, capsys):
    monkeypatch.setattr(smoothing, "ALPHA", 2)
    flags = ["--target", "onnx", "--int8", "--calib", str(images), "--imgsz", "64", "-o", str(tmp_path)]
    assert cli.export_main([str(micro), *flags, "--smooth", "auto"]) == 0
    assert "Smooth    off: SQNR " in capsys.readouterr().out
    bundle = open_bundle(next(tmp_path.iterdir()))
    assert "smoothed" not in bundle.manifest.details["quantization"]["calibration"]


@pytest.mark.slow
def test_constants_that_several_nodes_share_are_left_alone(micro, images, tmp_path):
    """Norms as initialised are one constant of the whole network."""
    saved = torch.load(micro, weights_only=True)
    for name, value in saved["state_dict"].items():
        if name.endswith(("norm.weight", "norm.bias")):
            value.fill_(name.endswith("weight"))
    torch.save(saved, tmp_path / "plain.ckpt")
    found = smooth_groups(hub(tmp_path / "plain.ckpt")[0].model)
    assert found and not [each.node for each in found if ".blocks." in each.node]
    bundle = export(tmp_path / "plain.ckpt", plan(images, imgsz=(64, 64)), tmp_path)
    assert bundle.manifest.details["quantization"]["smooth"]["value"] == "on"


def test_equal_constants_are_told_apart_by_name():
    gate, norm = torch.ones(4), torch.ones(4)
    tensors = [numpy_helper.from_array(norm.numpy(), name) for name in ("block.norm.weight", "block.gate.weight")]
    nodes = [helper.make_node("Mul", ["x", tensor.name], [tensor.name[6:]], name="block/Mul") for tensor in tensors]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    op = FusedOp("Op", {"g": gate, "n": norm}, "", {})
    names = {gate.data_ptr(): "block.gate.weight", norm.data_ptr(): "block.norm.weight"}
    assert match_constants(model, "block", op, names).constants == {"g": "block.gate.weight", "n": "block.norm.weight"}


def test_tables_are_reused_only_for_what_they_measured(monkeypatch, micro, images):
    graph, _ = hub(micro)
    layers = candidates(graph.model, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
    images = calibration_images(images, Preprocessing((64, 64)), 10, force=True)
    calls, original = [], CalibrationTable.add
    monkeypatch.setattr(CalibrationTable, "add", lambda self, values: calls.append(1) or original(self, values))
    config = QuantizationConfig(
        "int8", None, 0, "mse", "off", False, None, None, 0, None, "sha", "image", RAW, (), (), (), False
    )

    def measured(choice):
        """Images that had to be run, and what can be quantised then."""
        calls.clear()
        found = make_candidates(graph.model, layers, images, replace(config, smooth=choice), None, silent)
        return len(calls), list(found)

    assert measured("off") == (10, ["off"])
    assert measured("on") == (20, ["on"])  # the table of `off` has no maxima by channel
    assert measured("auto") == (0, ["off", "on"])
    assert measured("off") == (0, ["off"])
    monkeypatch.setattr(smoothing, "ALPHA", 0.6)
    assert measured("on") == (10, ["on"])  # other factors, another graph


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smooth": "maybe"}, "--smooth 'maybe' is unknown; choose from: auto, on, off"),
        ({"precision": "fp32", "calib": None}, "--smooth is for int8, this export is fp32"),
        ({"precision": "w8", "calib": None}, "--smooth is for int8, this export is w8"),
    ],
)
def test_plans_that_cannot_work(changes, message):
    with pytest.raises(UsageError, match=message):
        ExportPlan(**{"target": "onnx", "precision": "int8", "calib": "c", "smooth": "on", **changes})


@pytest.mark.slow
def test_the_demo_smoothed(tmp_path):
    bundle = export(CHECKPOINT, plan("demo", val="demo", weight_bits=7), tmp_path)
    quantization = bundle.manifest.details["quantization"]
    assert abs(bundle.manifest.accuracy["drop"]) <= 0.3 and bundle.manifest.accuracy["sqnr_db"] > 37.8  # 37.2 without
    assert quantization["smooth"] == {"value": "on", "reason": "as asked"}
    saved = CalibrationTable.from_json((bundle.path / "calibration.json").read_text())
    assert saved.identity == quantization["calibration"] and len(saved.identity["smoothed"]) == 64

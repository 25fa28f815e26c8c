"""A network that no shared code knows (tests/toy.py) through every target, and through int8."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from evm_deploy import load
from evm_deploy.calib.layers import quantizable_layers
from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.hub import graph as hub
from evm_deploy.export.pipeline import complete
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.export.source import Source
from evm_deploy.model.network import default_blocks
from tests.targets import FLOAT32
from tests.toy import CLASSES, OUTPUTS, toy_network

SIZE = (32, 48)


@pytest.fixture(scope="module")
def toy():
    """Return a Source that is traced once for all targets of this file."""
    return Source(toy_network())


@pytest.fixture(scope="module")
def bundles(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    found = {}

    def bundle(target, **changes):
        key = (target, *changes.items())
        if key not in found:
            found[key] = export(toy, ExportPlan(target, imgsz=SIZE, **changes), folder / str(len(found)))
        return found[key]

    return bundle


def expected(pixels):
    network = toy_network()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(pixels).float() / 255 - mean) / std
    with torch.inference_mode():
        return [value.numpy() for value in network.module(x.permute(0, 3, 1, 2))]


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.slow
def test_every_target_is_verified(target, bundles):
    """Outputs and each scan: of the shared block's two calls, the second is `shared#2`."""
    manifest = bundles(target).manifest
    assert manifest.parity["ok"] and manifest.parity["top1_agreement"] == 1.0
    assert {output["name"] for output in manifest.outputs} == set(OUTPUTS)
    names = {scan["name"] for scan in manifest.parity["scans"]}
    assert names == {"blocks.0", "blocks.1", "shared", "shared#2"}
    assert all(max(scan["ssm"], scan["probe"]) < 2e-5 for scan in manifest.parity["scans"])
    assert manifest.model["family"] == "ToyMamba" and list(manifest.model["blocks"]) == ["blocks.0", "blocks.1"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "coreml"])
def test_a_bundle_runs_predicts_and_tests_itself(target, bundles):
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    logits, feature_map = expected(pixels)
    with load(bundles(target).path) as model:
        have = model.run({"image": pixels})
        tolerance = 2e-2 if model.manifest.precision == "fp16" else 1e-4
        for name, want in zip(OUTPUTS, (logits, feature_map), strict=True):
            assert np.abs(have[name] - want).max() <= tolerance * max(1, np.abs(want).max()), name
        best = model.classify(pixels, top=CLASSES)[0]
        assert [each.index for each in best][:1] == [int(logits.argmax())] and len(best) == CLASSES
        assert all(check.ok for check in model.selftest())


@pytest.mark.slow
def test_probabilities_are_of_the_logits_alone(bundles):
    manifest = bundles("onnx", head="probs").manifest
    assert [output["name"] for output in manifest.outputs] == ["probs", "map"]
    pixels = np.random.default_rng(1).integers(0, 256, (1, *SIZE, 3), np.uint8)
    with load(bundles("onnx", head="probs").path) as model:
        have = model.run({"image": pixels})
    np.testing.assert_allclose(have["probs"].sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(have["map"], expected(pixels)[1], rtol=0, atol=1e-4)


def test_no_batch_norm_is_left(bundles):
    model = onnx.load(bundles("onnx").path / "model.onnx")
    assert not [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]


def test_int8_by_blocks_of_its_own(toy, tmp_path):
    """The Conv1d is quantised, the layers that feed a scan are not, and a block is what its ModuleList holds."""
    images = np.stack([synthetic_image(*SIZE, seed) for seed in range(24)])
    np.savez(tmp_path / "calib.npz", images=images)
    calib = str(tmp_path / "calib.npz")
    plan = ExportPlan("onnx", "int8", imgsz=SIZE, calib=calib, force_calib=True, weight_bits=7)
    bundle = export(toy, plan, tmp_path)
    assert bundle.manifest.accuracy["sqnr_db"] > 20 and bundle.manifest.accuracy["agreement"] > 0.5
    nodes = onnx.load(bundle.path / "model.onnx").graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    int8 = {
        n.name.rpartition("/")[0]
        for n in nodes
        if n.op_type in ("Conv", "MatMul", "Gemm") and n.input[1] in dequantized
    }
    assert {"mix", "reduce", "head"} <= int8
    assert not [name for name in int8 if name.endswith(("x_proj", "dt_proj", "out_proj"))]
    assert bundle.manifest.model["float_around_scans"] is True


def test_layers_around_scans_are_found_by_the_graph(toy):
    """u comes from a norm after the layer before, y goes to out_proj; a network may have them in int8."""
    source = toy
    plan, preprocessing = complete(ExportPlan("onnx", "fp32", imgsz=SIZE), source.network(None).spec)
    model = hub.trace(source.reference(plan, preprocessing), plan, {}).model
    every = {layer.module for layer in quantizable_layers(model)}
    around = {layer.module for layer in quantizable_layers(model, float_around_scans=True)}
    assert every - around >= {"blocks.0.out_proj", "blocks.1.out_proj", "shared.out_proj"} and "head" in around


def test_blocks_are_the_children_of_the_innermost_lists():
    def block():
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.down = nn.Sequential(block(), block()), nn.Conv2d(3, 3, 1)

    whole = nn.Module()
    whole.stem, whole.stages = block(), nn.ModuleList([Stage(), nn.Identity()])
    assert list(default_blocks(whole)) == ["stages.1", "stages.0.blocks.0", "stages.0.blocks.1"]
    assert list(default_blocks(nn.Sequential(block(), nn.ReLU()))) == ["0", "1"]
    assert list(default_blocks(block())) == []


def test_a_scan_that_is_wrong_in_the_artifact_is_named(toy, tmp_path, monkeypatch):
    """Negative control: the second call of the shared block is spoilt, and nothing else."""
    from evm_deploy.export import onnx as target
    from evm_deploy.export.hub import scans

    original = scans.OnnxScanAccess.in_situ

    def spoilt(self, feeds):
        found = original(self, feeds)
        found[-1] = {**found[-1], "y": found[-1]["y"] * np.float32(1.01)}
        return found

    monkeypatch.setattr(scans.OnnxScanAccess, "in_situ", spoilt)
    assert target.TARGET.scan_access is scans.OnnxScanAccess
    with pytest.raises(ParityError, match="shared#2 is off"):
        export(toy, ExportPlan("onnx", imgsz=SIZE), tmp_path)


def test_targets_share_one_trace(toy, bundles, monkeypatch, tmp_path):
    bundles("onnx")
    monkeypatch.setattr(hub, "_export", lambda *_: pytest.fail("traced again"))
    export(toy, ExportPlan("trt", imgsz=SIZE), tmp_path)


def test_what_the_network_does_not_give_is_refused(toy, tmp_path):
    with pytest.raises(UsageError, match="--head features: toymamba gives logits or probs"):
        export(toy, ExportPlan("onnx", imgsz=SIZE, head="features"), tmp_path)
    raw = replace(toy_network().spec, task="raw")
    with pytest.raises(UsageError, match="--val with --head raw"):
        export(toy_network()._replace(spec=raw), ExportPlan("onnx", "w8", imgsz=SIZE, val="x"), tmp_path)

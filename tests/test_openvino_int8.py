"""int8 in OpenVINO: the same quantised graph as ONNX, evaluated as OpenVINO computes it."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.table import CalibrationTable
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from tests.openvino import EVERY_LOWERING


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(autouse=True)
def tables(monkeypatch, folder):
    """No calibration table of another module or run is found. (The compiled extension is.)"""
    monkeypatch.setattr("evm_deploy.calib.table.cache_folder", lambda: folder)


def plan(**changes):
    return ExportPlan("openvino", precision="int8", **{"calib": "demo", "val": "demo", "max_drop": 0.3, **changes})


@pytest.mark.parametrize("scan", EVERY_LOWERING)
@pytest.mark.slow
def test_the_demo(scan, tmp_path):
    bundle = export(CHECKPOINT, plan(scan=scan), tmp_path)
    quantization, accuracy = bundle.manifest.details["quantization"], bundle.manifest.accuracy
    assert accuracy["drop"] <= 0.3 and accuracy["sqnr_db"] > 30 and quantization["in_float"] == []
    text = (bundle.path / "model.xml").read_text()
    kinds = Counter(re.findall(r'<layer [^>]*type="(\w+)"', text))
    assert kinds["FakeQuantize"] > 20
    assert kinds["EVSSBlockInt8XProj"] == (2 if scan == "plugin" else 0)
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())


@pytest.mark.slow
def test_the_trained_network(trained, glyphs, labelled_glyphs, tmp_path):
    """Images that it was not calibrated with; half a point at most, without any block kept in float."""
    np.savez(tmp_path / "calib.npz", images=glyphs(256, 5000, 64)[0])
    choices = {"calib": str(tmp_path / "calib.npz"), "val": str(labelled_glyphs)}
    wanted = plan(**choices, max_drop=0.5, imgsz=(64, 64), crop_pct=1.0)
    manifest = export(trained / "evm_tiny_glyphs64.ckpt", wanted, tmp_path / "out").manifest
    assert manifest.accuracy["drop"] <= 0.5 and manifest.accuracy["sqnr_db"] > 30
    assert manifest.details["quantization"]["in_float"] == []


def spoil(monkeypatch, key):
    """The range of one activation, a fiftieth of what it should be."""
    original = CalibrationTable.ranges

    def spoilt(self, method):
        ranges = original(self, method)
        ranges[key] = Range(ranges[key].low / 50, ranges[key].high / 50)
        return ranges

    monkeypatch.setattr(CalibrationTable, "ranges", spoilt)


@pytest.mark.slow
def test_a_spoilt_block_is_kept_in_float(monkeypatch, tmp_path):
    """Negative control of the gate, and what recovers it."""
    spoil(monkeypatch, "layers.1.blocks.0.op.out_proj:input")
    bundle = export(CHECKPOINT, plan(max_drop=0.1, scan="plugin"), tmp_path)
    assert bundle.manifest.details["quantization"]["in_float"] == ["layers.1.blocks.0"]
    kinds = Counter(re.findall(r'type="(EVSSBlock\w*)"', (bundle.path / "model.xml").read_text()))
    assert kinds == {"EVSSBlockInt8XProj": 1, "EVSSBlock": 1}


def test_it_needs_images(micro, tmp_path, capsys):
    with pytest.raises(UsageError, match="add --calib DIR"):
        ExportPlan("openvino", precision="int8")
    assert cli.export_main([str(micro), "--target", "openvino", "--int8", "-o", str(tmp_path / "out")]) == 2
    assert "int8 needs images to calibrate with" in capsys.readouterr().err

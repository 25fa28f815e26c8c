"""int8 and w8 Core ML packages: what is quantised, how accurate it is, and that the gates can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evm_deploy import cli
from evm_deploy.bundle.loaded import load
from evm_deploy.calib.evaluate import Accuracy
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.table import CalibrationTable
from evm_deploy.demo import CHECKPOINT, write_images
from evm_deploy.errors import AccuracyError, ToolchainError, UsageError
from evm_deploy.export.coreml import coremltools_patch
from evm_deploy.export.coreml import int8 as quantizer
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.mil import Program
from tests.toolchains import need

need("coremltools", module=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """No table of another test or run is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, count=16)
    return folder


def int8(calib, **changes):
    return ExportPlan("coreml", precision="int8", calib=str(calib), calib_images=16, force_calib=True, **changes)


@pytest.mark.slow
def test_w8_stores_weights_as_int8_and_leaves_the_scans_alone(micro, coreml_bundle, tmp_path):
    bundle = export(micro, ExportPlan("coreml", precision="w8", imgsz=(64, 64), min_target="iOS16"), tmp_path)
    program = Program(bundle.path / "model.mlpackage")
    stored = [op.outputs[0].name for op in main_block(program) if op.type.startswith("constexpr_")]
    assert len(stored) == bundle.manifest.details["quantization"]["int8_layers"] > 20
    assert not any("evm_scan" in name or "x_proj" in name for name in stored)
    assert not {"quantize", "dequantize"} & {op.type for op in program.operations}
    assert bundle.manifest.accuracy is None  # nothing to judge with was given
    assert bundle.manifest.parity["max_abs"] <= bundle.manifest.parity["limit"]
    weights = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert bundle.manifest.files[weights]["size_bytes"] < 0.6 * coreml_bundle.manifest.files[weights]["size_bytes"]
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())


def main_block(program):
    function = program.spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


@pytest.mark.slow
def test_int8_rounds_what_the_other_targets_round(micro, images, tmp_path):
    bundle = export(micro, int8(images, imgsz=(64, 64)), tmp_path)
    quantization = bundle.manifest.details["quantization"]
    assert bundle.manifest.accuracy["sqnr_db"] > 20 and quantization["in_float"] == []
    rounded = {key.rpartition(":")[0] for key in quantization["calibration"]["activations"]}
    assert {"layers.0.blocks.0.op.in_proj", "layers.0.blocks.0.conv_branch.3", "layers.2.1.conv_dw.0"} <= rounded
    assert not {"layers.0.blocks.0.op.conv2d", "patch_embed.0", "classifier.head"} & rounded
    program = Program(bundle.path / "model.mlpackage")
    by_result = {result.name: op for op in program.operations for result in op.results}
    for op in program.operations:
        inputs = [by_result[name].type for name in op.reads if name in by_result]
        if op.results[0].name.startswith("evm_scan"):
            assert "dequantize" not in inputs
        if op.type == "conv" and "conv_dw" in op.weight:
            assert inputs == ["dequantize"]
    assert (bundle.path / "calibration.json").is_file() and "speed_over_fp32_here" not in quantization
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())


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
    flags = ["--target", "coreml", "--int8", "--imgsz", "32", "--calib", str(images), "--force-calib", "-q"]
    flags += ["--calib-images", "16"]
    assert cli.export_main([str(micro), *flags, "-o", str(tmp_path)]) == 5
    assert "int8 is not accurate enough (at least 20 dB): same answers" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["micro_64-coreml-int8-32x32.rejected"]


@pytest.fixture
def few_blocks(monkeypatch):
    """The last blocks only: each that can stay in float is one more program to compute."""
    every = quantizer.quantizable_ops
    monkeypatch.setattr(quantizer, "quantizable_ops", lambda *args: every(*args)[-4:])


@pytest.mark.slow
def test_max_drop_keeps_the_spoilt_block_in_float(few_blocks, monkeypatch, labelled, tmp_path):
    spoil(monkeypatch, "layers.3.1.conv_pw2.0:input")
    bundle = export(CHECKPOINT, int8(labelled, val=str(labelled), max_drop=5.0), tmp_path)
    quantization = bundle.manifest.details["quantization"]
    assert quantization["in_float"] == ["layers.3.1"]
    assert min(quantization["sensitivity_sqnr_db"], key=quantization["sensitivity_sqnr_db"].get) == "layers.3.1"
    assert bundle.manifest.accuracy["drop"] <= 5.0


@pytest.mark.slow
def test_a_budget_that_cannot_hold_exits_5_with_everything_in_float(few_blocks, monkeypatch, micro, labelled, tmp_path):
    monkeypatch.setattr(Accuracy, "ok", property(lambda self: False))
    with pytest.raises(AccuracyError, match="w8 is not accurate enough"):
        plan = ExportPlan("coreml", precision="w8", imgsz=(32, 32), val=str(labelled), max_drop=0)
        export(micro, plan, tmp_path)
    manifest = json.loads((next(tmp_path.iterdir()) / "manifest.json").read_text())
    assert manifest["details"]["quantization"]["int8_layers"] == 0


@pytest.mark.slow
def test_the_trained_network_keeps_its_accuracy(trained, glyphs, tmp_path):
    """On a few images, so by SQNR. Top-1 and size, of w8 too, are in benchmarks/coreml.py."""
    np.savez(tmp_path / "calib.npz", images=glyphs(64, 5000, 64)[0])
    bundle = export(
        trained / "evm_tiny_glyphs64.ckpt", int8(tmp_path / "calib.npz", imgsz=(64, 64), crop_pct=1.0), tmp_path
    )
    assert bundle.manifest.accuracy["sqnr_db"] >= 30


def test_int8_needs_a_system_that_has_it(micro, images, tmp_path):
    with pytest.raises(UsageError, match=r"int8 activations need iOS17 or iOS18(?s:.*)--precision w8"):
        export(micro, int8(images, min_target="iOS16"), tmp_path)


@pytest.mark.slow
def test_another_coremltools_is_refused(monkeypatch, micro, tmp_path):
    """coremltools' passes have no public names, so another version may have others."""
    coremltools_patch.converter()  # patched by its true version, whatever ran before
    monkeypatch.setattr(quantizer.metadata, "version", lambda name: "9.1")
    with pytest.raises(ToolchainError, match=r"passes of coremltools 9.0(?s:.*)pip install coremltools==9.0"):
        export(micro, ExportPlan("coreml", precision="w8", imgsz=(32, 32)), tmp_path)

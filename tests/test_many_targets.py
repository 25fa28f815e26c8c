"""One command for several targets: traced once, and one that fails hides none of the others."""

from __future__ import annotations

import json

import pytest

from evm_deploy import cli
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.hub import graph as hub
from evm_deploy.export.source import Source


@pytest.fixture
def traces(monkeypatch):
    """How often the hub graph was traced."""
    original, seen = hub._export, []
    monkeypatch.setattr(hub, "_export", lambda *arguments: seen.append(arguments) or original(*arguments))
    return seen


def flags(checkpoint, targets, out, *more):
    return [str(checkpoint), "--target", targets, "--imgsz", "64", "-q", "-o", str(out), *more]


def test_a_target_that_fails_is_reported_and_the_others_are_exported(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evm_deploy._util.packages.find_spec", lambda name: None if name == "coremltools" else object())
    assert cli.export_main(flags(micro, "coreml,onnx,trt", tmp_path, "--json")) == 3
    out, err = capsys.readouterr()
    failed, onnx, trt = json.loads(out)
    assert failed["target"] == "coreml" and failed["exit_code"] == 3 and "packages are missing" in failed["error"]
    assert [entry["manifest"]["target"] for entry in (onnx, trt)] == ["onnx", "trt"]
    assert "evm-export: coreml: target 'coreml' cannot be built here" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["micro_64-onnx-fp32-64x64", "micro_64-trt-fp32-64x64"]


def test_the_largest_exit_code_is_returned(micro, tmp_path, monkeypatch, capsys):
    """Parity fails for two of three targets: 4, and both rejected artifacts are named."""
    monkeypatch.setattr("evm_deploy._util.packages.find_spec", lambda name: None if name == "coremltools" else object())
    assert cli.export_main(flags(micro, "onnx,coreml,trt", tmp_path, "--tol", "1e-12")) == 4
    err = capsys.readouterr().err
    assert err.count("the artifact is not the float model") == 2 and err.count(".rejected") == 2


def test_plans_that_no_target_can_do_stop_the_command_before_any_export(micro, tmp_path, capsys):
    assert cli.export_main(flags(micro, "onnx,coreml", tmp_path, "--precision", "int8-fp16")) == 2
    assert not list(tmp_path.iterdir())


def test_targets_of_one_command_share_a_trace(traces, micro, tmp_path):
    assert cli.export_main(flags(micro, "onnx,openvino,trt", tmp_path)) == 0
    assert len(traces) == 1 and len(list(tmp_path.iterdir())) == 3


def test_a_source_traces_again_only_for_what_differs(traces, micro, tmp_path):
    source = Source(micro)
    first = export(source, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "a")
    export(source, ExportPlan("onnx", "fp16", imgsz=(64, 64)), tmp_path / "b")
    export(source, ExportPlan("onnx", "w8", imgsz=(64, 64)), tmp_path / "c")
    assert len(traces) == 1
    export(source, ExportPlan("onnx", imgsz=(64, 64), head="probs"), tmp_path / "d")
    export(source, ExportPlan("onnx", imgsz=(64, 64), mean=(0.5, 0.5, 0.5)), tmp_path / "e")
    export(source, ExportPlan("onnx", imgsz=(32, 64)), tmp_path / "f")
    assert len(traces) == 4
    again = export(source, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "g")
    alone = export(micro, ExportPlan("onnx", imgsz=(64, 64)), tmp_path / "h")
    files = [(bundle.path / "model.onnx").read_bytes() for bundle in (first, again, alone)]
    assert files[0] == files[1] == files[2]  # what one export does to the shared graph, no other sees

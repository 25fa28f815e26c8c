"""The parity gate notices what it is there for: each fault is put into the artifact alone, and must exit 4."""

from __future__ import annotations

from dataclasses import replace

import golden
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from evm_deploy import cli
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.manifest import Decision
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, CalibrationError, ParityError, ToolchainError
from evm_deploy.export.hub import graph as graph_module
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.target import Artifact
from evm_deploy.export.targets import load_targets
from evm_deploy.export.verify_lowerings import lowerings
from evm_deploy.model import batch_norm
from evm_deploy.model.efficientvmamba import blocks
from evm_deploy.scan import onnx_function
from evm_deploy.toolchain import plugins
from tests.conftest import save_as_released
from tests.targets import FLOAT32
from tests.toolchains import need_target


def run(micro, out, *flags, target="onnx"):
    flags = [*flags, *(["--scan", "portable"] if target == "openvino" else [])]  # test_openvino.py spoils the others
    return cli.export_main([str(micro), "--target", target, "--imgsz", "64", "-o", str(out), "-q", *flags])


def rejected(out, target="onnx"):
    found = list(out.iterdir())
    assert [path.name for path in found] == [f"micro_64-{target}-fp32-64x64.rejected"]
    assert list(found[0].glob("model.*"))
    with pytest.raises(BundleError, match="was rejected"):
        open_bundle(found[0])


def body(function):
    """The Scan body of the portable form."""
    scan = next(node for node in function.node if node.op_type == "Scan")
    return next(a.g for a in scan.attribute if a.name == "body")


@pytest.fixture
def break_function(monkeypatch):
    """break_function(edit): every portable body is edited before it is attached."""
    original = onnx_function.selective_scan_function

    def install(edit):
        def broken(*args, **how):
            function = original(*args, **how)
            edit(function)
            return function

        monkeypatch.setattr(onnx_function, "selective_scan_function", broken)

    return install


def wrong_decay(function):
    """exp(1.01 dt A) instead of exp(dt A)."""
    graph = body(function)
    graph.initializer.append(numpy_helper.from_array(np.float32(1.01), "factor"))
    exp = next(i for i, node in enumerate(graph.node) if node.op_type == "Exp")
    graph.node.insert(exp, helper.make_node("Mul", ["exponent", "factor"], ["scaled"]))
    graph.node[exp + 1].input[0] = "scaled"


def forgotten_state(function):
    """Every block starts from zero."""
    graph = body(function)
    last = next(node for node in graph.node if node.output[0] == "h_out")
    graph.node.insert(len(graph.node) - 2, helper.make_node("Sub", [last.input[0]] * 2, ["zero"]))
    last.input[0] = "zero"


TARGETS = pytest.mark.parametrize("target", ["onnx", "openvino"])


@TARGETS
@pytest.mark.parametrize("fault", [wrong_decay, forgotten_state])
@pytest.mark.slow
def test_a_broken_scan_body_is_rejected(fault, target, break_function, micro, tmp_path, capsys):
    break_function(fault)
    assert run(micro, tmp_path, target=target) == 4
    assert "scan layers.0.blocks.0.op" in capsys.readouterr().err
    rejected(tmp_path, target)


def cumsum_division(opset, block_steps=None, softplus=True):
    """The form of several public ports: h_t = P_t * cumsum(x / P), P = exp(cumsum(dt A)). One chunk, no epsilon."""
    f = onnx_function.Body("cumsum/")
    one, two, three, last = f.const([1]), f.const(2), f.const([3]), f.const([4])
    dt = f.op("Softplus", f.op("Add", "delta", f.op("Unsqueeze", "bias", one)))
    exponent = f.op("Mul", f.op("Unsqueeze", dt, last), f.op("Unsqueeze", "A", one))
    product = f.op("Exp", f.op("CumSum", exponent, two))
    x = f.op("Mul", f.op("Unsqueeze", f.op("Mul", dt, "u"), last), f.op("Unsqueeze", "B", three))
    h = f.op("Mul", product, f.op("CumSum", f.op("Div", x, product), two))
    y = f.op("ReduceSum", f.op("Mul", h, f.op("Unsqueeze", "C", three)), last, keepdims=0)
    skip = f.op("Mul", "u", f.op("Unsqueeze", "skip", one))
    f.nodes.append(helper.make_node("Add", [y, skip], ["y"]))
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function("evm", "SelectiveScan", onnx_function.INPUTS, ["y"], f.nodes, opsets)


@TARGETS
@pytest.mark.slow
def test_cumsum_division_is_rejected(target, monkeypatch, micro, tmp_path, capsys):
    monkeypatch.setattr(onnx_function, "selective_scan_function", cumsum_division)
    assert run(micro, tmp_path, target=target) == 4
    assert "off by" in capsys.readouterr().err
    rejected(tmp_path, target)


@pytest.mark.slow
def test_cumsum_division_is_rejected_where_the_logits_hide_it(monkeypatch, tmp_path, capsys):
    """Small deltas and D = 1, as freshly initialised: the logits agree, the large-delta test_inputs do not."""
    import golden
    import torch

    state = dict(golden.model_case("micro_64")["state"])
    for key, value in state.items():
        if key.endswith("Ds"):
            state[key] = np.ones_like(value)
        if key.endswith("dt_projs_bias"):
            state[key] = np.full_like(value, -7)
        if key.endswith("dt_projs_weight"):
            state[key] = value * 0.01
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, tmp_path / "micro_64.pt")
    monkeypatch.setattr(onnx_function, "selective_scan_function", cumsum_division)
    assert run(tmp_path / "micro_64.pt", tmp_path / "out") == 4
    message = capsys.readouterr().err
    assert "with large deltas" in message and "logits differ" not in message


def during_trace(monkeypatch, spoil, restore):
    """Spoil the model only while the graph is made: the float reference stays right."""
    original = graph_module._export

    def broken(model, plan):
        undo = spoil(model)
        try:
            return original(model, plan)
        finally:
            restore(model, undo)

    monkeypatch.setattr(graph_module, "_export", broken)


@TARGETS
@pytest.mark.slow
def test_a_swapped_direction_is_rejected(target, monkeypatch, micro, tmp_path, capsys):
    right = blocks.split_directions

    def swap(model):
        blocks.split_directions = lambda x: right(x)[:, [0, 2, 1, 3]]

    def restore(model, undo):
        blocks.split_directions = right

    during_trace(monkeypatch, swap, restore)
    assert run(micro, tmp_path, target=target) == 4
    assert "reads inputs off by" in capsys.readouterr().err
    rejected(tmp_path, target)


@pytest.mark.slow
def test_a_wrongly_folded_batch_norm_is_rejected(monkeypatch, micro, tmp_path):
    original = batch_norm.folded
    monkeypatch.setattr(batch_norm, "folded", lambda *values: original(*values[:-1], 1e-3))
    assert run(micro, tmp_path) == 4
    rejected(tmp_path)


@pytest.mark.slow
def test_a_network_that_overflows_is_rejected_and_says_so(tmp_path, capsys):
    import golden
    import torch

    state = {k: torch.from_numpy(v) for k, v in golden.model_case("micro_64")["state"].items()}
    state["classifier.head.weight"] = torch.full_like(state["classifier.head.weight"], 3e38)
    torch.save(state, tmp_path / "micro_64.pt")
    assert run(tmp_path / "micro_64.pt", tmp_path / "out") == 4
    assert "of the float model contain NaN or Inf" in capsys.readouterr().err


@pytest.mark.slow
def test_dead_channels_are_no_failure(tmp_path):
    """All-zero projections: the SSM part is zero, and relative errors must not blow up."""
    import golden
    import torch

    state = {k: torch.from_numpy(v) for k, v in golden.model_case("micro_64")["state"].items()}
    for key in state:
        if key.endswith("x_proj_weight"):
            state[key] = torch.zeros_like(state[key])
    torch.save(state, tmp_path / "micro_64.pt")
    assert run(tmp_path / "micro_64.pt", tmp_path / "out") == 0


def test_a_tolerance_too_tight_is_rejected_and_says_so(micro, tmp_path, capsys):
    assert run(micro, tmp_path, "--tol", "1e-12") == 4
    assert "logits differ by" in capsys.readouterr().err


def test_a_good_export_replaces_nothing_but_itself(micro, tmp_path):
    assert run(micro, tmp_path) == 0
    assert run(micro, tmp_path) == 2
    assert run(micro, tmp_path, "--force") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["micro_64-onnx-fp32-64x64"]


def test_selftest_notices_a_changed_weight(micro, tmp_path):
    """Negative control of the self-test: a scaled weight, hashes made to fit."""
    import json
    from hashlib import sha256

    assert run(micro, tmp_path) == 0
    folder = next(tmp_path.iterdir())
    model = onnx.load(str(folder / "model.onnx"))
    tensor = next(t for t in model.graph.initializer if t.name == "classifier.head.bias")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.1, tensor.name))
    onnx.save(model, str(folder / "model.onnx"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["sha256"] = sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with load(folder) as bundle:
        checks = {check.name: check.ok for check in bundle.selftest()}
    assert not checks["logits"] and checks["scan large_delta"]
    assert cli.run_main([str(folder), "--selftest"]) == 4


#: Target -> precisions whose layers the device computes in float16.
IN_FLOAT16 = {
    "onnx": {"fp16"},
    "openvino": {"fp16"},
    "coreml": {"fp16", "int8", "w8"},
    "trt": {"fp16", "int8-fp16"},
    "trt-rtx": {"fp16", "int8-fp16"},
    "qnn": {"fp16"},
    "litert": {"fp16"},
    "executorch": set(),
}


def test_every_target_says_where_float16_can_overflow():
    assert {name: set(target.float16) & set(target.precisions) for name, target in load_targets().items()} == IN_FLOAT16


def scaled(folder, factor):
    """A checkpoint with one convolution times `factor` and a later one divided by it: float32 can do that."""
    state = dict(golden.model_case("micro_64")["state"])
    for name, by in (("conv_pw.1", factor), ("conv_pw2.0", 1 / factor)):
        state[f"layers.2.1.{name}.weight"] = state[f"layers.2.1.{name}.weight"] * np.float32(by)
    state["layers.2.1.conv_pw.1.bias"] = state["layers.2.1.conv_pw.1.bias"] * np.float32(factor)
    return save_as_released(state, folder / "scaled.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision"), [(target, precision) for target, has in IN_FLOAT16.items() for precision in sorted(has)]
)
def test_what_overflows_float16_is_rejected_though_this_machine_hides_it(tmp_path, images, target, precision):
    need_target(target)
    calib = images if precision.startswith("int8") else None
    plan = ExportPlan(target, precision, imgsz=64, calib=calib)
    with pytest.raises((ParityError, CalibrationError), match="65504") as caught:
        export(scaled(tmp_path, 6e4), plan, tmp_path / "out")
    assert "use --precision fp32" in str(caught.value) or (target, precision) == ("coreml", "int8")  # in calibration


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in IN_FLOAT16 if target in FLOAT32])
def test_float32_takes_what_float16_cannot(tmp_path, target):
    assert export(scaled(tmp_path, 6e4), ExportPlan(target, "fp32", imgsz=64), tmp_path / "out").manifest.parity["ok"]


@pytest.mark.parametrize(
    ("target", "scan", "more"),
    [
        ("trt", "aot", {}),
        ("trt", "plugin", {}),
        ("trt", "aot", {"precision": "int8", "calib": "demo"}),
    ],
)
def test_an_export_that_nothing_here_can_verify_is_refused_before_work(monkeypatch, tmp_path, target, scan, more):
    monkeypatch.setattr(plugins, "find_plugin", lambda runtime: None)
    monkeypatch.setattr(Source, "network", lambda self, plan: pytest.fail("work has started"))
    with pytest.raises(ToolchainError, match=f"--scan {scan} cannot be verified here: the native scan was not built"):
        export(CHECKPOINT, ExportPlan(target, scan=scan, **more), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_artifact_without_a_lowering_for_this_machine_is_no_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(plugins, "find_plugin", lambda runtime: None)
    for name, target in load_targets().items():
        artifact = Artifact(tmp_path / "model", Decision("aot", "in the engine"), {})
        if name in ("openvino", "executorch"):
            continue  # their libraries would be compiled
        with pytest.raises(ToolchainError):
            lowerings(target, artifact)
        assert lowerings(target, replace(artifact, scan=Decision("portable", "as asked"))) == {"portable": None}

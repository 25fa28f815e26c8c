"""TensorRT without a GPU: its ONNX in ONNX Runtime, and engines of TensorRT-RTX, which are built and not run."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from evm_deploy import cli, load
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.calib.int8 import candidates
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, ParityError, ToolchainError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.tensorrt import target as tensorrt
from evm_deploy.export.tensorrt.layers import read_kernels, traffic_bytes
from evm_deploy.export.tensorrt.settings import EngineSettings
from evm_deploy.model.efficientvmamba.checkpoint import KEEP_FLOAT, WEIGHT_ONLY
from evm_deploy.runtimes.base import Batch
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.runtimes.tensorrt import check_built_for, engine_bytes
from evm_deploy.runtimes.tensorrt.build_engine import EngineBuildError, record, required, take_in
from evm_deploy.scan import onnx_function, reference, unrolled
from evm_deploy.toolchain.platforms import host_platform
from tests.tensorrt import engine, network, scan_model, traced
from tests.test_native import magnitudes, random_scan
from tests.toolchains import need

MICRO = {"imgsz": (64, 64)}


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path_factory):
    """No calibration table of another test or run is found."""
    folder = tmp_path_factory.mktemp("tables")
    monkeypatch.setattr("evm_deploy.calib.table.cache_folder", lambda: folder)


@pytest.fixture
def rtx():
    need("TensorRT-RTX")


@pytest.fixture
def without_rtx(monkeypatch):
    """Hide TensorRT, as on a machine without it."""
    monkeypatch.setattr("evm_deploy.runtimes.tensorrt.installed", lambda target: False)
    monkeypatch.setattr("evm_deploy.export.tensorrt.target.installed", lambda target: False)


# The graph


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), *(st.integers(1, high) for high in (2, 3, 60, 9, 6)), st.sampled_from([0.1, 3.0, 30.0]))
def test_the_unrolled_scan_on_any_shape(seed, b, K, L, D, N, spread):
    inputs = random_scan(seed, b, K, L, D, N, spread)
    feeds = dict(zip(onnx_function.INPUTS, inputs, strict=True))
    got = OnnxRuntime(scan_model(b, K, L, D, N).SerializeToString(), 1).run(feeds)["y"]
    want, terms = reference.selective_scan(*inputs), reference.selective_scan(*magnitudes(*inputs))
    assert np.abs(got - want).max() <= 2e-6 * terms.max()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-fp16"])
def test_portable_graphs_are_standard_and_typed(precision, demo_graph):
    graph, plan = demo_graph
    model, int8 = network(graph, replaced(plan, precision))
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Scan", "Loop", "If"}
    assert ("QuantizeLinear" in kinds) == bool(int8) == precision.startswith("int8")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [constants[n.input[2]] for n in model.graph.node if "QuantizeLinear" in n.op_type and len(n.input) > 2]
    zeros += [constants[n.input[2]] for n in model.graph.node if n.op_type == "DequantizeLinear" and len(n.input) > 2]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-fp16"])
@pytest.mark.parametrize("scan, aot", [("aot", 1), ("plugin", None)])
def test_plugin_graphs_name_the_plugin(scan, aot, precision, demo_graph):
    graph, plan = demo_graph
    model, _ = network(graph, replaced(plan, precision, scan))
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    nodes = [node for node in model.graph.node if node.op_type == "SelectiveScan"]
    assert len(nodes) == len(graph.scans) and not model.functions
    for node in nodes:
        assert {node.input[2], node.input[5], node.input[6]} <= floats  # A, skip and bias: never rounded to half
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"evm", b"1")
        assert attributes.get("aot") == aot


@pytest.fixture(scope="module")
def demo_graph():
    return traced(CHECKPOINT, (64, 64), "trt")


def replaced(plan, precision, scan="portable"):
    return ExportPlan(
        "trt", precision=precision, imgsz=plan.imgsz, scan=scan, calib="x" if "int8" in precision else None
    )


# Bundles


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_224"])
def test_golden_logits(name, checkpoint, tmp_path, without_rtx):
    bundle = export(
        checkpoint(name), ExportPlan("trt", imgsz=(224, 224), input="tensor", batch=Batch(1, 1, 3)), tmp_path
    )
    case = golden.model_case(name)
    logits = OnnxRuntime(bundle.path / "model.onnx").run({"tensor": case["images"]})["logits"]
    assert np.abs(logits - case["logits"]).max() < 1e-4


@pytest.mark.slow
def test_a_wrong_carry_is_refused(monkeypatch, micro, tmp_path, without_rtx):
    """Negative control of the parity gate: every chunk starts from the state of the first."""
    monkeypatch.setattr(unrolled, "_carry", lambda f, end, decay, chunks: f.op("Mul", end, end))
    with pytest.raises(ParityError):
        export(micro, ExportPlan("trt", **MICRO), tmp_path)


@pytest.fixture(scope="module")
def deferred(tmp_path_factory):
    """An int8 bundle made where there is no TensorRT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evm_deploy.runtimes.tensorrt.installed", lambda target: False)
        folder = tmp_path_factory.mktemp("tables")
        patch.setattr("evm_deploy.calib.table.cache_folder", lambda: folder)
        plan = ExportPlan(
            "trt-rtx", precision="int8", calib="demo", val="demo", smooth="off", settings=EngineSettings(sms=(86,))
        )
        return export(CHECKPOINT, plan, tmp_path_factory.mktemp("deferred"))


@pytest.mark.slow
def test_int8_without_tensorrt_is_a_bundle_without_its_engine(deferred):
    manifest = deferred.manifest
    assert (
        not manifest.built and manifest.artifact == "model.onnx" and {"finish.py", "build.json"} <= set(manifest.files)
    )
    assert manifest.accuracy["drop"] <= 1.0 and manifest.accuracy["sqnr_db"] > 30
    assert "tensorrt_rtx --onnx=model.onnx" in (deferred.path / "README.md").read_text()
    with pytest.raises(BundleError, match="has no engine yet"):
        load(deferred.path)


@pytest.mark.slow
def test_a_second_process_finishes_it(rtx, deferred, tmp_path):
    """With the bundle and TensorRT-RTX alone: evm_deploy cannot be imported there."""
    folder = tmp_path / "bundle"
    shutil.copytree(deferred.path, folder)
    blocked = "import sys, runpy; sys.modules['evm_deploy'] = None; sys.argv = ['finish.py']; "
    code = blocked + "runpy.run_path('finish.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["built"] and manifest["artifact"] == "model.engine" and manifest["details"]["engine"]["sms"] == [86]
    assert (folder / "model.engine").read_bytes()[:4] == b"vtrt"
    with pytest.raises(ToolchainError, match="cudaError 35"):  # opened: all hashes fit; there is no driver
        load(folder)


@pytest.mark.slow
def test_no_defer_and_finish_say_what_is_missing(without_rtx, deferred, micro_bundle, tmp_path, capsys):
    flags = ["--target", "trt", "--no-defer", "-o", str(tmp_path)]
    assert cli.export_main(flags) == 3
    assert "cannot build the engine that --no-defer asks for: it is not installed" in capsys.readouterr().err
    assert cli.export_main(["--finish", str(micro_bundle.path)]) == 2
    assert "bundles for 'onnx' have no engine to build" in capsys.readouterr().err
    assert cli.export_main(["--finish", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


REFUSED = {
    "a batch without end": (ExportPlan("trt", batch=Batch(1, 1, None)), "use --batch MIN:OPT:MAX"),
    "architectures for TensorRT": (ExportPlan("trt", settings=EngineSettings(sms=(86,))), "--sm is for trt-rtx"),
    "another release for RTX": (
        ExportPlan("trt-rtx", settings=EngineSettings(version_compatible=True)),
        "TensorRT-RTX has no --version-compatible",
    ),
    "a plugin for RTX": (ExportPlan("trt-rtx", scan="aot"), "it has: auto, portable"),
}


@pytest.mark.parametrize("plan, message", REFUSED.values(), ids=REFUSED)
def test_what_there_is_not(plan, message, micro, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        export(micro, plan, tmp_path)


def test_a_plugin_bundle_has_the_plugins_sources_and_commands(without_rtx, micro, tmp_path):
    bundle = export(
        micro, ExportPlan("trt", scan="plugin", settings=EngineSettings(workspace_mib=512), **MICRO), tmp_path
    )
    assert {"plugin/plugin.cu", "plugin/selective_scan.cu", "plugin/selective_scan.h"} <= set(bundle.manifest.files)
    text = (bundle.path / "README.md").read_text()
    words = "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --memPoolSize=workspace:512M"
    assert f"{words} --staticPlugins=libevm_tensorrt.so" in text and "finish.py --library libevm_tensorrt.so" in text


# Engines of TensorRT-RTX


def in_float(kernels, nodes):
    """Return the convolutions and linear layers of `nodes` whose kernel reads no int8."""
    products = [kernel for kernel in kernels if kernel.kind != "kgen"]
    int8 = {node for kernel in products for node in kernel.nodes if kernel.inputs[0].dtype == "Int8"}
    return [node for node in nodes if node not in int8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, precision",
    [("tiny_224", p) for p in ("fp32", "fp16", "int8", "int8-fp16")] + [("base_224", "fp16")],
)
def test_the_network_builds_and_its_kernels_read_what_they_should(rtx, case, precision, checkpoint, tmp_path, graphs):
    graph, plan = graphs(case)
    model, int8 = network(graph, replaced(plan, precision))
    done = engine(model, tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    kernels = read_kernels((tmp_path / "bundle" / "layers.txt").read_text())
    assert len(kernels) > 100
    every = [
        layer.node
        for layer in candidates(graph.model, "int8", graph.fusable, KEEP_FLOAT, WEIGHT_ONLY)
        if not layer.weight_only
    ]
    assert in_float(kernels, every) == ([] if int8 else every)  # the second: negative control, a float engine
    scans = [kernel for kernel in kernels if any("/SelectiveScan/" in node for node in kernel.nodes)]
    assert len(scans) >= len(graph.scans)
    exps = [kernel for kernel in scans if any("/SelectiveScan/Exp_" in node for node in kernel.nodes)]
    assert exps and all("Float" in {tensor.dtype for tensor in kernel.inputs} for kernel in exps)
    assert not any(tensor.dtype == "Int8" for kernel in scans for tensor in kernel.inputs)
    if "fp16" in precision:
        half = sum("Half" in {tensor.dtype for tensor in kernel.inputs} for kernel in kernels)
        assert half > len(kernels) / 5


@pytest.fixture(scope="module")
def graphs(checkpoint):
    """graphs(case) -> hub graph and plan, at the smallest size with as many layers."""
    made = {}

    def make(case):
        if case not in made:
            made[case] = traced(checkpoint(case), (64, 64))
        return made[case]

    return make


@pytest.mark.slow
def test_traffic_of_the_first_stages_scan(rtx, tmp_path):
    """The traffic of T at 224 is at most 100 MB. A chunk of twice the steps, the control, has more."""
    found = {}
    for steps in (None, 28):
        folder = tmp_path / str(steps)
        assert engine(scan_model(1, 4, 784, 96, 16, steps), folder).returncode == 0
        found[steps] = traffic_bytes(read_kernels((folder / "layers.txt").read_text()))
    assert found[None] <= 100e6 < found[28]


@pytest.mark.slow
def test_dynamic_batch_needs_a_profile(rtx, micro, tmp_path):
    graph, plan = traced(micro, (64, 64), batch=Batch(1, 2, 4))
    model, _ = network(graph, plan)
    shapes = [[n, 64, 64, 3] for n in (1, 2, 4)]
    assert engine(model, tmp_path / "with", shapes).returncode == 0
    done = engine(model, tmp_path / "without")
    assert done.returncode == 3 and "has no optimization profile: export with --batch MIN:OPT:MAX" in done.stderr


def test_builder_errors_are_raised(rtx, tmp_path):
    done = engine(scan_model(1, 1, 5, 3, 2), tmp_path / "sm", sms=(87,))
    assert done.returncode == 3 and "SM87 unknown: this TensorRT release builds for SM75, SM80" in done.stderr
    broken = scan_model(1, 1, 5, 3, 2)
    broken.graph.node[-1].op_type, broken.graph.node[-1].domain = "Unheard", "evm"
    done = engine(broken, tmp_path / "parser")
    assert done.returncode == 3 and "the parser refuses the model" in done.stderr and "scan/Add" in done.stderr
    done = engine(scan_model(1, 1, 5, 3, 2), tmp_path / "flag", version_compatible=True)
    assert done.returncode == 3 and "the build failed: IBuilder::buildSerializedNetwork: Error" in done.stderr


def test_a_flag_that_a_release_no_longer_has_is_named():
    with pytest.raises(EngineBuildError, match="--version-compatible: this TensorRT release has no VERSION_COMPATIBLE"):
        required(SimpleNamespace(), "VERSION_COMPATIBLE", "--version-compatible")


def test_weights_beyond_float16_are_refused_by_name(demo_graph):
    graph, plan = copy.deepcopy(demo_graph)
    weight = [tensor for tensor in graph.model.graph.initializer if len(tensor.dims) == 4][-1]  # not the first layer's
    weight.CopyFrom(numpy_helper.from_array(np.full(tuple(weight.dims), 1e6, np.float32), weight.name))
    with pytest.raises(UsageError, match="reaches 1e\\+06, the largest float16 is 65504"):
        network(graph, replaced(plan, "fp16"))


@pytest.mark.slow
def test_a_library_is_taken_into_the_bundle(deferred, tmp_path):
    shutil.copytree(deferred.path, tmp_path / "bundle")
    (tmp_path / "libevm_tensorrt.so").write_bytes(b"a library")
    (tmp_path / "bundle" / "model.engine").write_bytes(b"an engine")
    inside = take_in(tmp_path / "bundle", str(tmp_path / "libevm_tensorrt.so"))
    record(tmp_path / "bundle", {"tensorrt": "10.3.0"}, inside)
    manifest = open_bundle(tmp_path / "bundle").manifest  # hashes fit
    assert manifest.built and manifest.plugins == {
        host_platform(): "plugins/" + host_platform() + "/libevm_tensorrt.so"
    }


def test_a_builder_that_crashes_is_an_error(monkeypatch, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text("import os; os.abort()")
    monkeypatch.setattr(tensorrt.engine_builder, "__file__", str(script))
    with pytest.raises(ToolchainError, match="ended by signal 6"):
        tensorrt.build_engine("trt-rtx", Path(tmp_path))


# Reading engines


def test_engines_with_a_json_prefix_are_read():
    plan, facts = b"ptrt" + bytes(60), b'{"names": {}}'
    assert engine_bytes(plan) == plan
    assert engine_bytes(len(facts).to_bytes(4, "little") + facts + plan) == plan
    assert engine_bytes(b"") == b""


@pytest.mark.parametrize("key", ["settings", "engine"])  # the second in bundles of before
def test_an_engine_of_another_release_is_named(key, tmp_path):
    manifest = {"details": {"engine": {"tensorrt": "10.3.0"}}, "plan": {key: {"version_compatible": False}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    check_built_for(tmp_path / "model.engine", "10.3.0")
    with pytest.raises(ToolchainError, match=r"built with TensorRT 10\.3\.0, but 11\.4\.0 is installed"):
        check_built_for(tmp_path / "model.engine", "11.4.0")
    manifest["plan"][key]["version_compatible"] = True
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    check_built_for(tmp_path / "model.engine", "11.4.0")

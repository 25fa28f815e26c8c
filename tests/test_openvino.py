"""The OpenVINO target: IRs with our extension and without, run by OpenVINO alone too."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import golden
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from evm_deploy import cli
from evm_deploy.bundle.bundle import Bundle, open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export import openvino
from evm_deploy.export.openvino.ir import normalise_rows, save
from evm_deploy.export.openvino.settings import HALF_KERNELS, OpenVinoExportSettings
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes import registry
from evm_deploy.runtimes.base import Batch, RunOptions
from evm_deploy.runtimes.openvino import INFO, OpenVinoRuntime, OpenVinoSettings, open_core, reason
from evm_deploy.toolchain import openvino_extension
from evm_deploy.toolchain.openvino_extension import extension
from evm_deploy.toolchain.platforms import host_platform
from tests.openvino import EVERY_LOWERING, LOWERINGS, built, opened, traced
from tests.test_fused import block_model, random_block
from tests.toolchains import need

APP = Path(__file__).parent / "openvino_app"
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal(20).astype(np.float32)


@pytest.fixture(scope="session")
def bundles(micro, bundle_of):
    """The smallest golden model at 64x64, by lowering."""

    class Bundles(dict[str, Bundle]):
        def __missing__(self, scan):
            return bundle_of(micro, ExportPlan("openvino", imgsz=(64, 64), scan=scan))

    return Bundles()


def pixels(batch=1, height=64, width=64):
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_224", "small_224", "base_224"])
def test_golden_logits(name, checkpoint, tmp_path):
    """Batch 3 and 1 through one dynamic graph, both lowerings; of B, which is slow to trace, only the first."""
    case = golden.model_case(name)
    batch = Batch.parse("dynamic")
    graph, plan = traced(checkpoint(name), ExportPlan("openvino", imgsz=(224, 224), batch=batch, input="tensor"))
    for scan in LOWERINGS[:1] if name == "base_224" else LOWERINGS:
        with opened(built(graph, replace(plan, scan=scan), tmp_path / scan)) as runtime:
            assert np.abs(runtime.run({"tensor": case["images"]})["logits"] - case["logits"]).max() < 1e-4
            one = runtime.run({"tensor": case["images"][:1]})["logits"]
            assert np.abs(one - case["logits"][:1]).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_odd_golden_case(scan, checkpoint, tmp_path):
    case = golden.model_case("tiny_odd_200x232")
    plan = ExportPlan("openvino", imgsz=(200, 232), input="tensor", scan=scan)
    graph, plan = traced(checkpoint("tiny_odd_200x232"), plan)
    with opened(built(graph, plan, tmp_path / scan)) as runtime:
        assert np.abs(runtime.run({"tensor": case["images"]})["logits"] - case["logits"]).max() < 1e-4


@pytest.mark.parametrize("imgsz, batch", [((4, 4), "1"), ((33, 47), "3"), ((90, 70), "1:2:4")])
@pytest.mark.slow
def test_pixels_and_odd_grids(imgsz, batch, micro, tmp_path):
    """uint8 pixels through the artifact equal normalised pixels through the torch model."""
    graph, plan = traced(micro, ExportPlan("openvino", imgsz=imgsz, batch=Batch.parse(batch)))
    model, spec = load_checkpoint(micro)
    images = pixels(plan.batch.max, *imgsz)
    with torch.inference_mode():
        from evm_deploy.export.pipeline import complete

        want = model(torch.from_numpy(complete(plan, spec)[1].normalise(images))).numpy()
    for scan in LOWERINGS:
        with opened(built(graph, replace(plan, scan=scan), tmp_path / scan)) as runtime:
            assert np.abs(runtime.run({"image": images})["logits"] - want).max() < 1e-4


@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_every_scan_was_verified_as_it_ships(scan, bundles):
    parity = bundles[scan].manifest.parity
    assert [(s["name"], s["lowering"]) for s in parity["scans"]] == [(f"layers.{i}.blocks.0.op", scan) for i in (0, 1)]
    assert all(s["ssm"] < 2e-6 and s["probe"] < 2e-6 for s in parity["scans"])


@pytest.mark.compiler
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_spoilt_block_is_rejected(precision, monkeypatch, micro, tmp_path, capsys):
    """Negative control of ScanAccess: A of one block is 1 % off, in the artifact alone."""
    original = openvino.lowered

    def spoilt(graph, scan):
        model, sites = original(graph, scan)
        name = sites[1].reads["A"]
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.float32(1.01) * numpy_helper.to_array(tensor), name))
        return model, sites

    monkeypatch.setattr(openvino, "lowered", spoilt)
    flags = ["--target", "openvino", "--imgsz", "64", "--precision", precision, "-q", "-o", str(tmp_path)]
    assert cli.export_main([str(micro), *flags]) == 4
    message = capsys.readouterr().err
    assert "plugin: scan layers.1.blocks.0.op" in message and "layers.0.blocks.0.op" not in message
    with pytest.raises(BundleError, match="was rejected"):
        open_bundle(next(tmp_path.iterdir()))


@pytest.mark.slow
def test_equal_constants_of_blocks_are_not_confused(tmp_path):
    """Use freshly initialised weights: skip is 1 and A equal in every block, so OpenVINO stores them once."""
    state = {key: torch.from_numpy(value) for key, value in golden.model_case("micro_64")["state"].items()}
    for key in state:
        if key.endswith("Ds"):
            state[key] = torch.ones_like(state[key])
        if key.endswith("A_logs"):
            n = state[key].shape[1]
            state[key] = torch.log(torch.arange(1, n + 1).float()).repeat(state[key].shape[0], 1)
    torch.save(state, tmp_path / "fresh.pt")
    for scan in LOWERINGS:
        plan = ExportPlan("openvino", imgsz=(32, 32), precision="fp16", scan=scan)
        assert export(tmp_path / "fresh.pt", plan, tmp_path / scan).manifest.parity["ok"]


# ---------------------------------------------------------------------------------------------------------- the files


def operators(path):
    return collections.Counter(re.findall(r'<layer [^>]*type="(\w+)" version="(\w+)"', path.read_text()))


@pytest.mark.compiler
def test_what_an_ir_holds(bundles):
    plugin, portable = (operators(bundles[scan].path / "model.xml") for scan in LOWERINGS)
    assert plugin[("EVSSBlock", "evm")] == 2 and ("TensorIterator", "opset1") not in plugin
    assert not [kind for kind in portable if kind[1] == "evm"]
    assert portable[("TensorIterator", "opset1")] == 2
    assert not {kind for kind, _ in portable} & {"SoftPlus", "Loop"}  # imprecise; slow
    ir = (bundles["plugin"].path / "model.xml").read_text()
    names, kinds = re.findall(r'<layer id="\d+" name="([^"]+)"', ir), re.findall(r'<layer [^>]*type="(\w+)"', ir)
    first = [kinds.index(kind) for kind in ("Convert", "Multiply", "Add", "Transpose", "Convolution")]
    assert first == sorted(first)  # pixels are normalised where they are
    assert {"layers.0.blocks.0/EVSSBlock", "layers.2.1.conv_pw.0/Conv/WithoutBiases"} <= set(names)


def layer_norms(shape, axis, tail):
    """An OpenVINO model: LayerNorm of one axis, with weight and bias if asked."""
    from openvino import Model, opset13

    x = opset13.parameter(shape, np.float32, name="x")
    y = opset13.mvn(x, opset13.constant([axis]), True, 1e-5, "INSIDE_SQRT")
    if tail:
        y = opset13.add(opset13.multiply(y, opset13.constant(WEIGHT)), opset13.constant(-WEIGHT))
    y.output(0).get_tensor().set_names({"y"})
    return Model([y], [x], "norms")


@pytest.mark.parametrize("tail", [True, False], ids=["weight", "alone"])
@pytest.mark.parametrize(
    ("shape", "sizes", "axis", "nodes"),
    [
        ([-1, 5, 7, 20], [2, 5, 7, 20], -1, 1),
        ([2, -1, -1, 20], [2, 5, 7, 20], 3, 1),
        ([-1, 2, 5, 7, 20], [2, 2, 5, 7, 20], 4, 1),
        ([-1, 35, 20], [2, 35, 20], -1, 0),
        ([2, 20, 7, 20], [2, 20, 7, 20], 1, 0),
        ([2, 5, 7, -1], [2, 5, 7, 20], -1, 0),
    ],
    ids=str,
)
def test_a_layer_norm_is_computed_on_rows(shape, sizes, axis, nodes, tail):
    """Same values under the same name, in one node of the CPU plugin."""
    import openvino

    x, model = RNG.standard_normal(sizes).astype(np.float32), layer_norms(shape, axis, tail)
    assert normalise_rows(model) == nodes
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    mean, variance = x.mean(axis, keepdims=True, dtype=np.float64), x.var(axis, keepdims=True, dtype=np.float64)
    expected = (x - mean) / np.sqrt(variance + 1e-5)
    expected = expected * WEIGHT - WEIGHT if tail else expected
    np.testing.assert_allclose(compiled({"x": x})["y"], expected, rtol=1e-4, atol=1e-5)
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("MVN") >= nodes and not (nodes and "RMS" in kinds), kinds


@pytest.mark.compiler
def test_metadata_is_in_the_ir_and_in_the_manifest(bundles):
    import openvino as ov

    bundle = bundles["portable"]
    model = ov.Core().read_model(str(bundle.path / "model.xml"))
    facts = {
        key: model.get_rt_info(["evm_deploy", key]).astype(str) for key in ("model", "inference_precision", "scan")
    }
    assert facts == {"model": "micro_64", "inference_precision": "f32", "scan": "portable"}
    assert json.loads(model.get_rt_info(["evm_deploy", "preprocessing"]).astype(str))["size"] == [64, 64]
    manifest = bundles["plugin"].manifest
    assert manifest.details["inference_precision"] == "f32"
    assert manifest.plugins == {host_platform(): f"plugins/{host_platform()}/{extension().name}"}
    assert manifest.scan["value"] == "plugin" and "OpenVINO 20" in manifest.scan["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_the_same_bytes_from_any_process(scan, micro, bundles, tmp_path):
    code = "from evm_deploy.cli import export_main; raise SystemExit(export_main())"
    flags = ["--target", "ov", "--imgsz", "64", "--scan", scan, "-o", str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, str(micro), *flags], check=True, cwd=tmp_path, capture_output=True)
    again = tmp_path / bundles[scan].path.name
    for name in ("model.xml", "model.bin", "selftest/scan.xml"):
        a, b = (sha256((folder / name).read_bytes()).hexdigest() for folder in (again, bundles[scan].path))
        assert a == b, name


@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_float16_weights_and_float32_scans(scan, micro, bundles, tmp_path):
    plan = ExportPlan("openvino", imgsz=(64, 64), precision="fp16", scan=scan)
    bundle = export(micro, plan, tmp_path)
    sizes = [(b.path / "model.bin").stat().st_size for b in (bundle, bundles[scan])]
    assert sizes[0] < 0.6 * sizes[1] and bundle.size_bytes > sizes[0]
    assert all(s["ssm"] < 2e-6 and s["probe"] < 2e-6 for s in bundle.manifest.parity["scans"])
    assert bundle.manifest.details["inference_precision"] == ("f16" if scan == "plugin" else "f32")


@pytest.mark.parametrize("flags", [(), ("--int8", "--calib", "demo"), ("--fp16", "--scan", "portable")])
def test_half_blocks_are_for_float16_on_the_native_kernel(flags, micro, tmp_path, capsys):
    given = [str(micro), "--target", "openvino", "--imgsz", "64", "--half-blocks", *flags, "-q", "-o", str(tmp_path)]
    assert cli.export_main(given) == 2
    assert "add --fp16 --scan plugin" in capsys.readouterr().err


@pytest.mark.compiler
def test_half_blocks_need_a_cpu_that_can_verify_them(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(openvino_extension, "isa", lambda library: "avx512vnni")
    flags = ["--target", "openvino", "--imgsz", "64", "--fp16", "--half-blocks", "-q", "-o", str(tmp_path)]
    assert cli.export_main([str(micro), *flags]) == 3
    assert "--half-blocks cannot be verified here: the kernel is avx512vnni" in capsys.readouterr().err


@pytest.mark.compiler
def test_half_blocks_need_a_block_of_the_native_kernel(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_extension, "isa", lambda library: "avx512bf16")
    wanted = ExportPlan("openvino", imgsz=(64, 64), precision="fp16", settings=OpenVinoExportSettings(half_blocks=True))
    graph, plan = traced(micro, wanted)
    with pytest.raises(UsageError, match="the native kernel has no block of this network"):
        built(replace(graph, fusable={}), plan, tmp_path / "none")
    assert built(graph, plan, tmp_path / "some").details["half_blocks"] == "bfloat16"


@pytest.mark.compiler
@pytest.mark.slow
def test_half_blocks_multiply_in_half_precision(micro, tmp_path):
    """The outputs differ from those of float32 blocks by some steps of it. Other kernels ignore the attribute."""
    half = HALF_KERNELS.get(openvino_extension.isa(extension()))
    if not half:
        pytest.skip("this CPU has no kernel for products in half precision")
    plan = ExportPlan("openvino", imgsz=(64, 64), precision="fp16", settings=OpenVinoExportSettings(half_blocks=True))
    bundle = export(micro, plan, tmp_path)
    assert bundle.manifest.parity["ok"] and bundle.manifest.plan["settings"]["half_blocks"] is True
    text = (bundle.path / "model.xml").read_text()
    assert len(re.findall(f'half="{half}"', text)) == len(re.findall(r'type="EVSSBlock"', text)) == 2
    (other,) = {*HALF_KERNELS.values()} - {half}  # which this CPU lacks
    outputs = {}
    for value in (half, "false", other, *(["true"] if half == "bfloat16" else ())):  # true: of IRs before it had names
        (tmp_path / f"{value}.xml").write_text(text.replace(f'half="{half}"', f'half="{value}"'))
        shutil.copy(bundle.path / "model.bin", tmp_path / f"{value}.bin")
        with OpenVinoRuntime(tmp_path / f"{value}.xml", RunOptions(plugin=extension())) as runtime:
            outputs[value] = runtime.run({"image": pixels()})["logits"]
    assert 1e-5 < np.abs(outputs[half] - outputs["false"]).max() / np.abs(outputs["false"]).max() < 0.05
    np.testing.assert_array_equal(outputs[other], outputs["false"])
    np.testing.assert_array_equal(outputs.get("true", outputs[half]), outputs[half])
    (tmp_path / "false.xml").write_text(text.replace(f'half="{half}"', 'half="f8"'))
    with pytest.raises(BundleError, match="half is f8, expected bfloat16, float16 or false"):
        OpenVinoRuntime(tmp_path / "false.xml", RunOptions(plugin=extension()))


@pytest.mark.slow
def test_float16_refuses_weights_that_overflow(tmp_path):
    state = {key: torch.from_numpy(value) for key, value in golden.model_case("micro_64")["state"].items()}
    state["layers.2.1.conv_pw.0.weight"] *= 1e7
    torch.save(state, tmp_path / "big.pt")
    with pytest.raises(UsageError, match="the largest float16 is 65504"):
        export(tmp_path / "big.pt", ExportPlan("openvino", imgsz=(64, 64), precision="fp16"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["probs", "features"])
def test_other_heads(head, micro, tmp_path):
    bundle = export(micro, ExportPlan("openvino", imgsz=(64, 64), head=head), tmp_path)
    with load(bundle.path) as model:
        values = model.run({"image": pixels()})
    assert list(values) == (["probs"] if head == "probs" else [f"feature{i}" for i in range(4)])


# ----------------------------------------------------------------------------------------------------- OpenVINO alone

ALONE = """
import sys, json, numpy, openvino
core = openvino.Core()
if len(sys.argv) > 3:
    core.add_extension(sys.argv[3])
model = core.compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
result = model(numpy.load(sys.argv[2]))["logits"]
ours = {"evm_deploy", "torch", "onnx", "onnxruntime"} & set(sys.modules)
print(json.dumps({"logits": result.tolist(), "modules": sorted(ours)}))
"""


@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_an_ir_runs_in_openvino_alone(scan, bundles, tmp_path):
    bundle = bundles[scan]
    test_inputs = load_file(bundle.path / "selftest" / "probes.safetensors")
    np.save(tmp_path / "image.npy", test_inputs["image"][:1])
    added = [bundle.path / bundle.manifest.plugins[host_platform()]] if scan == "plugin" else []
    command = [sys.executable, "-c", ALONE, bundle.path / "model.xml", tmp_path / "image.npy", *added]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["modules"] == []
    assert np.abs(np.array(result["logits"]) - test_inputs["logits"][:1]).max() < 1e-4


@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_the_commands_of_the_readme_run(scan, bundles):
    folder = bundles[scan].path
    text = (folder / "README.md").read_text()
    plain = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "import openvino" in block)
    show = "\nprint(outputs.shape)"
    done = subprocess.run([sys.executable, "-c", plain + show], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "(1, 10)\n", done.stderr
    command = next(line.split() for line in text.splitlines() if line.startswith("    benchmark_app "))
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:], "-niter", "3"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "Median:" in done.stdout, done.stdout[-2000:]


@pytest.mark.compiler
def test_a_program_in_cpp_runs_it(bundles, tmp_path):
    """Built with the CMake package of the wheel."""
    from openvino.utils import get_cmake_path

    need("cmake")
    settings = [f"-DOpenVINO_DIR={get_cmake_path()}", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", APP, "-B", tmp_path, *settings], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    for scan in LOWERINGS:
        bundle = bundles[scan]
        test_inputs = load_file(bundle.path / "selftest" / "probes.safetensors")
        (tmp_path / "image").write_bytes(test_inputs["image"][:1].tobytes())
        library = [bundle.path / bundle.manifest.plugins[host_platform()]] if scan == "plugin" else []
        command = [tmp_path / "app", bundle.path / "model.xml", tmp_path / "image", *library]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert np.abs(np.array(done.stdout.split(), np.float32) - test_inputs["logits"][0]).max() < 1e-4


# -------------------------------------------------------------------------------------------------------- the runtime


@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_selftest_and_prediction(scan, bundles, capsys):
    assert cli.run_main([str(bundles[scan].path), "--selftest"]) == 0
    assert f"scans ran as {scan}" in capsys.readouterr().out
    with load(bundles[scan].path) as model:
        assert len(model.predict([pixels()[0]], top=3)[0]) == 3


@pytest.mark.compiler
def test_selftest_notices_a_changed_weight(bundles, tmp_path):
    """Negative control: one float of the weights, hashes made to fit."""
    folder = shutil.copytree(bundles["plugin"].path, tmp_path / "bundle")
    weights = bytearray((folder / "model.bin").read_bytes())
    bias = np.frombuffer(golden.model_case("micro_64")["state"]["classifier.head.bias"].tobytes(), np.uint8).tobytes()
    at = weights.index(bias)
    weights[at : at + len(bias)] = (np.frombuffer(bias, np.float32) + np.float32(0.1)).tobytes()
    (folder / "model.bin").write_bytes(weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.bin"]["sha256"] = sha256(weights).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with load(folder) as model:
        checks = {check.name: check.ok for check in model.selftest()}
    assert not checks["logits"] and checks["scan large_delta"]


def layers_of(runtime):
    """Return (type, execution precision) of each executed node, by name."""
    nodes = runtime.compiled.get_runtime_model().get_ops()
    return {n.friendly_name: tuple(n.get_rt_info()[key] for key in ("layerType", "runtimePrecision")) for n in nodes}


@pytest.mark.compiler
def test_what_runs_is_float32_unless_the_export_says_half(bundles, micro, tmp_path):
    """OpenVINO's own default is bfloat16 on CPUs that have it."""
    plugin = bundles["plugin"].path / bundles["plugin"].manifest.plugins[host_platform()]
    with OpenVinoRuntime(bundles["plugin"].path / "model.xml", RunOptions(plugin=plugin)) as runtime:
        nodes = layers_of(runtime)
        assert nodes["layers.0.blocks.0/EVSSBlock"] == ("Reference", "f32")
        assert not [name for name, (_, precision) in nodes.items() if precision in ("bf16", "f16")]
    half = export(micro, ExportPlan("openvino", imgsz=(64, 64), precision="fp16"), tmp_path)
    with OpenVinoRuntime(half.path / "model.xml", RunOptions(plugin=plugin)) as runtime:
        nodes = layers_of(runtime)
        assert nodes["layers.0.blocks.0/EVSSBlock"] == ("Reference", "f32")  # the native kernel stays float32
        if not {"BF16", "FP16"} & set(runtime.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
            pytest.skip("this CPU has neither bfloat16 nor float16")
        assert [name for name, (_, precision) in nodes.items() if precision == runtime.precision != "f32"]
        noted = [note for note in half.manifest.notes if "computes this model in float16" in note]
        assert bool(noted) == (runtime.precision == "f16")


@pytest.mark.compiler
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_our_operators_are_marked_precision_sensitive(precision, micro, tmp_path):
    """A plugin that computes in float16 hands unmarked operators float16: only CPUs with AVX512-FP16 show that."""
    bundle = export(micro, ExportPlan("openvino", imgsz=(64, 64), precision=precision), tmp_path)
    core = open_core(bundle.path / bundle.manifest.plugins[host_platform()])
    for file, count in (("model.xml", 2), ("selftest/scan.xml", 1)):
        model = core.read_model(str(bundle.path / file))
        for read in (model, model.clone()):
            marked = [n.get_type_name() for n in read.get_ops() if "DisablePrecisionConversion_0" in n.get_rt_info()]
            ours = [kind for kind in marked if kind != "Constant"]  # float16 exports mark those of the scans themselves
            assert len(ours) == count and set(ours) <= {"EVSSBlock", "SelectiveScan"}


@pytest.mark.parametrize("exact", [False, True])
def test_results_that_verification_reads_are_marked_precision_sensitive(exact, tmp_path):
    """A plugin that computes in float16 rounds unmarked results: only CPUs with AVX512-FP16 show that."""
    from openvino import Core, Model, opset13

    x = opset13.parameter([2], np.float32, name="x")
    save(Model([opset13.relu(x)], [x], "relu"), tmp_path / "relu.xml", exact_results=exact)
    marks = {
        node.get_type_name(): "DisablePrecisionConversion_0" in node.get_rt_info()
        for node in Core().read_model(str(tmp_path / "relu.xml")).get_ops()
    }
    assert marks == {"Parameter": False, "Relu": False, "Result": exact}


@pytest.mark.compiler
@pytest.mark.parametrize("hint", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("halved", [False, True], ids=["float32 constants", "float16 constants"])
def test_any_precision_around_our_operators(hint, halved, bundles, tmp_path):
    """The model compiles and agrees in every precision that this CPU has, however its constants are stored."""
    import openvino as ov

    bundle = bundles["plugin"]
    plugin = bundle.path / bundle.manifest.plugins[host_platform()]
    core = open_core(plugin)
    model = core.read_model(str(bundle.path / "model.xml"))
    if halved:  # as a user does who compresses an IR of ours
        ov.save_model(model, tmp_path / "half.xml", compress_to_fp16=True)
        model = core.read_model(str(tmp_path / "half.xml"))
    feeds = {"image": pixels()}
    with OpenVinoRuntime(bundle.path / "model.xml", RunOptions(plugin=plugin)) as runtime:
        want = runtime.run(feeds)["logits"]
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    got = compiled(feeds)[0]
    assert np.abs(got - want).max() <= (1e-6 if (hint, halved) == ("f32", False) else 3e-2) * np.abs(want).max()


@pytest.mark.compiler
def test_a_compilation_that_fails_is_told_in_a_line(tmp_path):
    """float16 into a float32 operator, as before it was marked: the cause, not the signature of the node."""
    block = onnx.load_from_string(block_model(random_block(1, 20, 3, 16), 1, 4, 4))
    block.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(RuntimeError) as caught:
        open_core(extension()).read_model(block.SerializeToString())
    assert "Parameter" in str(caught.value)
    told = reason(caught.value)
    assert "x is f16, expected f32" in told and "Parameter" not in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("scan", EVERY_LOWERING)
def test_threads_agree_bit_for_bit(scan, bundles):
    with load(bundles[scan].path, threads=1) as one, load(bundles[scan].path, threads=2) as two:
        want = one.run({"image": pixels()})["logits"]
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda i: (one, two)[i % 2].run({"image": pixels()})["logits"], range(40)):
                np.testing.assert_array_equal(got, want)


@pytest.mark.compiler
@pytest.mark.parametrize("device", ["CPU", "AUTO", "AUTO:CPU", "HETERO:CPU"])
def test_devices(device, bundles):
    with load(bundles["plugin"].path) as plain, load(bundles["plugin"].path, device=device, threads=1) as model:
        np.testing.assert_array_equal(
            model.run({"image": pixels()})["logits"], plain.run({"image": pixels()})["logits"]
        )


@pytest.mark.parametrize("device", ["GPU", "GPU.1", "NPU", "HETERO:GPU,CPU", "AUTO:NPU", "TPU", "cpu"])
def test_a_device_that_is_not_there(device, bundles, capsys):
    import openvino as ov

    if device.partition(".")[0] in ov.Core().available_devices:
        pytest.skip(f"this machine has a {device}")
    assert cli.run_main([str(bundles["portable"].path), "--selftest", "--openvino-device", device]) == 2
    message = capsys.readouterr().err
    assert "not found; OpenVINO finds: CPU" in message and "Traceback" not in message


@pytest.mark.compiler
def test_compiled_models_are_cached_apart_for_each_library(bundles, tmp_path):
    model = bundles["plugin"].path / "model.xml"
    library = bundles["plugin"].path / bundles["plugin"].manifest.plugins[host_platform()]
    other = tmp_path / library.name
    other.write_bytes(library.read_bytes() + b"\0")  # another build under the same name
    seen = []
    for plugin in (library, library, other):
        options = RunOptions(plugin=plugin, settings=OpenVinoSettings(cache=tmp_path / "cache"))
        with OpenVinoRuntime(model, options) as runtime:
            seen.append(
                (runtime.compiled.get_property("LOADED_FROM_CACHE"), runtime.run({"image": pixels()})["logits"])
            )
    assert [cached for cached, _ in seen] == [False, True, False]
    for _, logits in seen:
        np.testing.assert_array_equal(logits, seen[0][1])


def test_compiled_models_are_cached_apart_for_each_bundle(bundles, tmp_path):
    """Two versions of a bundle at one place, of one time and size: what layers of a container may look like."""
    place = tmp_path / "bundle"
    logits = []
    for scale in (1.0, 2.0):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(bundles["portable"].path, place)
        constants = re.findall(
            r'element_type="f32" shape="[^"]*" offset="(\d+)" size="(\d+)"', (place / "model.xml").read_text()
        )
        offset, size = max(((int(at), int(size)) for at, size in constants), key=lambda found: found[1])
        weights = np.memmap(place / "model.bin", np.float32, "r+", offset, (size // 4,))
        weights *= scale
        weights.flush()
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["files"]["model.bin"]["sha256"] = sha256((place / "model.bin").read_bytes()).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest))
        for file in place.rglob("*"):
            os.utime(file, (0, 0))
        with load(place, cache=tmp_path / "cache") as model:
            logits.append(model.run({"image": pixels()})["logits"])
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("change", ["bit", "cut", "unsealed", "other"])
def test_a_compiled_model_that_was_changed_is_compiled_again(change, bundles, tmp_path):
    """OpenVINO itself would load most of these, and compute something else."""
    options, artifact = RunOptions(settings=OpenVinoSettings(cache=tmp_path)), bundles["portable"].path / "model.xml"
    with OpenVinoRuntime(artifact, options) as runtime:
        want = runtime.run({"image": pixels()})["logits"].copy()
    (blob,) = tmp_path.rglob("*.blob")
    content = bytearray(blob.read_bytes())
    if change == "bit":
        content[len(content) // 2] ^= 0x40
    blob.write_bytes(content[: len(content) // 2 if change == "cut" else None])
    if change == "unsealed":
        blob.with_name(f"{blob.name}.sha256").unlink()
    if change == "other":
        blob.with_name(f"{blob.name}.sha256").write_bytes(b"\xff")
    for cached in (False, True):
        with OpenVinoRuntime(artifact, options) as runtime:
            assert runtime.compiled.get_property("LOADED_FROM_CACHE") is cached
            np.testing.assert_array_equal(runtime.run({"image": pixels()})["logits"], want)


def test_a_cache_that_cannot_be_written_is_an_error(bundles, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.run_main([str(bundles["portable"].path), "--selftest", "--cache", str(tmp_path / "file")]) == 2
    message = capsys.readouterr().err
    assert "cache" in message and "internal error" not in message


def test_the_cache_is_a_flag(bundles, tmp_path):
    for _ in range(2):
        flags = ["--selftest", "--cache", str(tmp_path / "cache")]
        assert cli.run_main([str(bundles["portable"].path), *flags]) == 0
    assert list((tmp_path / "cache").rglob("*.blob"))


def test_onnx_has_neither_devices_nor_a_cache(micro_bundle):
    with pytest.raises(UsageError, match="has execution providers in place of devices"):
        load(micro_bundle.path, device="GPU")
    with pytest.raises(UsageError, match="no compiled models"):
        load(micro_bundle.path, cache="somewhere")


@pytest.mark.compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow(bundles):
    """reliability/load.py does this a million times."""

    def resident_kb():
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    with load(bundles["plugin"].path, threads=1) as model:
        for _ in range(300):
            model.run({"image": pixels()})
        before = resident_kb()
        for _ in range(2000):
            model.run({"image": pixels()})
        assert resident_kb() - before < 2000


# ------------------------------------------------------------------------------------------------- what does not work


@pytest.mark.compiler
def test_a_lowering_that_is_not_in_the_bundle(bundles):
    with pytest.raises(UsageError, match=r"native nodes only(?s:.*)--scan portable"):
        load(bundles["plugin"].path, scan="portable")
    with pytest.raises(UsageError, match="exported with portable scans"):
        load(bundles["portable"].path, scan="plugin")


@pytest.mark.slow
def test_without_an_extension(bundles, monkeypatch, micro, tmp_path, capsys):
    def none():
        raise ToolchainError("no compiler here", "install one")

    with pytest.raises(BundleError, match=r"need the OpenVINO extension(?s:.*)--scan portable"):
        OpenVinoRuntime(bundles["plugin"].path / "model.xml")
    monkeypatch.setattr(openvino, "extension", none)
    monkeypatch.setattr(registry, "RUNTIMES", (replace(INFO, kernels=replace(INFO.kernels, installed=none)),))
    with pytest.raises(ToolchainError, match=r"no compiler here; the bundle contains a library(?s:.*)install one"):
        load(bundles["plugin"].path)
    with load(bundles["plugin"].path, scan="bundled") as model:
        assert "from the bundle" in model.scan.reason
        assert all(check.ok for check in model.selftest())
    flags = [str(micro), "--target", "openvino", "--imgsz", "32", "-q", "-o", str(tmp_path)]
    assert cli.export_main([*flags, "--scan", "plugin"]) == 3
    assert "no compiler here\n  install one" in capsys.readouterr().err
    assert cli.export_main(flags) == 0
    assert "portable: standard operators only: no compiler here" in capsys.readouterr().out


def test_no_library_for_other_platforms(micro, tmp_path, capsys):
    flags = [str(micro), "--target", "openvino", "--platform", "linux-aarch64", "-o", str(tmp_path / "out")]
    assert cli.export_main(flags) == 2
    assert "target 'openvino' has no native library for --platform" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_ir(bundles, tmp_path):
    (tmp_path / "model.xml").write_text("<net>")
    with pytest.raises(BundleError, match="OpenVINO cannot read"):
        OpenVinoRuntime(tmp_path / "model.xml")


@pytest.mark.compiler
def test_an_onnx_bundle_runs_on_the_extension_too(micro_bundle):
    """The same nodes: OpenVINO reads them from the ONNX file."""
    core = open_core(extension())
    model = core.compile_model(str(micro_bundle.path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    test_inputs = load_file(micro_bundle.path / "selftest" / "probes.safetensors")
    assert np.abs(model(test_inputs["image"][:1])[0] - test_inputs["logits"][:1]).max() < 1e-4
    assert "Reference" in {node.get_rt_info()["layerType"] for node in model.get_runtime_model().get_ops()}

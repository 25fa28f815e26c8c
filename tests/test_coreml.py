"""Core ML packages against the float model, in the MIL runtime; faults put into saved packages are noticed."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch

from evm_deploy import cli
from evm_deploy._util.packages import install_hint
from evm_deploy.bench import bench_on_mac, device
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export import verify
from evm_deploy.export.coreml import coremltools_patch
from evm_deploy.export.coreml import package as mlpackage
from evm_deploy.export.coreml import program as mlprogram
from evm_deploy.export.coreml.coremltools_patch import converter
from evm_deploy.export.hub.graph import with_pre_and_postprocessing
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from evm_deploy.runtimes.coreml import CoreMlRuntime, tensor_spec
from evm_deploy.runtimes.coreml.tools import coremltools
from evm_deploy.runtimes.mil import MilRuntime, Program
from evm_deploy.scan import mil
from evm_deploy.scan.reference import selective_scan
from tests.coreml import SIZES, built, plan_for
from tests.toolchains import need

need("coremltools", module=True)


@pytest.mark.slow
def test_float32_matches_the_golden_logits(checkpoint, tmp_path):
    """T, S and B at 224x224 are in benchmarks/coreml.py."""
    case = golden.model_case("tiny_odd_200x232")
    plan = plan_for(imgsz=case["images"].shape[2:], precision="fp32", input="tensor")
    artifact, _, _ = built(checkpoint("tiny_odd_200x232"), tmp_path, plan)
    with MilRuntime(artifact.path) as runtime:
        logits = runtime.run({"input_tensor": case["images"][:1]})["logits"]
    assert np.abs(logits - case["logits"][:1]).max() < 1e-5
    assert artifact.details["static_cost"]["largest_rank"] <= 5


@pytest.mark.slow
def test_float16_is_within_two_thousandths(checkpoint, tmp_path):
    """And converted in under 20 s of a core."""
    images = golden.model_case("tiny_224")["images"][:1, :, :64, :64]
    start = time.process_time()
    artifact, module, _ = built(checkpoint("tiny_224"), tmp_path, plan_for(input="tensor"))
    assert time.process_time() - start < 20
    with torch.inference_mode(), MilRuntime(artifact.path) as runtime:
        logits, want = runtime.run({"input_tensor": images})["logits"], module(torch.from_numpy(images))[0].numpy()
    assert 1e-5 < np.linalg.norm(logits - want) / np.linalg.norm(want) < 2e-3


@pytest.mark.slow
def test_pixels_are_normalised_exactly(coreml_fp32):
    """coremltools' own pass would make a batch_norm of it, with an epsilon that nobody asked for: off by 5e-6."""
    artifact, module, _ = coreml_fp32
    with MilRuntime(artifact.path) as runtime:
        assert "batch_norm" not in {op.type for op in runtime.program.operations}
        pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
        logits = runtime.run({"image": pixels})["logits"]
    with torch.inference_mode():
        want = module(torch.from_numpy(pixels))[0].numpy()
    assert np.abs(logits - want).max() < 1e-6 * max(1, np.abs(want).max())


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": Batch(3, 3, 3), "input": "tensor", "imgsz": (64, 80)},  # 80 steps: the last chunk is not full
        {"imgsz": (33, 47), "head": "features", "min_target": "iOS16", "precision": "fp32"},
        {"imgsz": (4, 4), "head": "probs", "min_target": "iOS18"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_batches_sizes_heads_and_systems(changes, micro, tmp_path):
    exported = export(micro, plan_for(**changes), tmp_path)
    assert exported.manifest.parity["ok"] and exported.manifest.details["min_target"] == changes.get(
        "min_target", "iOS17"
    )
    with load(exported.path) as model:
        assert all(check.ok for check in model.selftest())


def scan_case(rng, b=1, K=2, L=13, D=3, N=4):
    draw = rng.standard_normal
    case = {"u": draw((b, K, L, D)), "delta": 2 * draw((b, K, L, D)), "A": -np.exp(draw((K, D, N)))}
    case |= {"B": draw((b, K, L, N)), "C": draw((b, K, L, N)), "skip": draw((K, D)), "bias": draw((K, D))}
    return {key: value.astype(np.float32) for key, value in case.items()}


@pytest.mark.parametrize("L", [1, 2, 3, 7, 16, 17, 49, 50])
def test_the_composite_is_the_scan_for_any_length(L, tmp_path):
    """Lengths that fill the last chunk and that do not, with large deltas."""
    case = scan_case(np.random.default_rng(L), L=L)
    mlpackage.save(mlprogram.scan_program(ScanShape(2, L, 3, 4), "iOS17"), tmp_path / "scan.mlpackage")
    with MilRuntime(tmp_path / "scan.mlpackage") as runtime:
        y = runtime.run(case)["y"]
    error, limit = verify.ssm_error(y, case)
    assert error <= limit


@pytest.mark.parametrize("T", [1, 4, 5, 20])
def test_the_composite_with_other_chunks(T, monkeypatch, tmp_path):
    monkeypatch.setattr(mil, "chunk_length", lambda L: T)
    case = scan_case(np.random.default_rng(T), L=20)
    mlpackage.save(mlprogram.scan_program(ScanShape(2, 20, 3, 4), "iOS17"), tmp_path / "scan.mlpackage")
    with MilRuntime(tmp_path / "scan.mlpackage") as runtime:
        want = selective_scan(**case)
        assert np.abs(runtime.run(case)["y"] - want).max() < 1e-5 * np.abs(want).max()
        assert max(len(result.shape) for op in runtime.program.operations for result in op.results) <= 4


def test_chunks_are_chosen_by_static_cost():
    assert (mil.chunk_length(784), mil.chunk_length(1)) == (7, 1)
    assert all(1 <= mil.chunk_length(L) <= min(L, mil.MAX_STEPS) for L in range(1, 300))


def test_every_operation_of_a_scan_is_named(coreml_bundle):
    program = Program(coreml_bundle.path / "model.mlpackage")
    cost = coreml_bundle.manifest.details["static_cost"]
    prefixes = {f"evm_scan_layers_{i}_blocks_0_op" for i in (0, 1)}
    named = [op for op in program.operations if op.results[0].name.startswith(tuple(prefixes))]
    assert cost["scan_operations"] == len(named) > 100 and cost["operations"] == len(program.operations)
    assert sum(op.type == "exp" for op in program.operations) == sum(op.type == "exp" for op in named)


def test_what_travels_in_the_package(micro, coreml_bundle):
    spec = coremltools().utils.load_spec(str(coreml_bundle.path / "model.mlpackage"))
    facts = spec.description.metadata.userDefined
    assert facts["checkpoint_sha256"] == sha256(micro.read_bytes()).hexdigest() and facts["evm_deploy"]
    assert spec.specificationVersion == 8
    image = spec.description.input[0].type.imageType
    assert (image.width, image.height) == (64, 64)
    assert coreml_bundle.manifest.inputs[0]["dtype"] == "uint8" and coreml_bundle.manifest.precision == "fp16"
    assert coreml_bundle.size_bytes == sum(
        f.stat().st_size for f in coreml_bundle.path.glob("model.mlpackage/**/*") if f.is_file()
    )


@pytest.mark.slow
def test_a_classifier_gives_its_labels(micro, tmp_path):
    labels = tuple(f"kind {i}" for i in range(10))
    exported = export(micro, plan_for(head="probs", labels=labels, precision="fp32", imgsz=(32, 32)), tmp_path)
    spec = coremltools().utils.load_spec(str(exported.path / "model.mlpackage"))
    assert [(o.name, o.type.WhichOneof("Type")) for o in spec.description.output] == [
        ("classLabel", "stringType"),
        ("probs", "dictionaryType"),
    ]
    assert spec.description.predictedProbabilitiesName == "probs"
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    with MilRuntime(exported.path / "model.mlpackage") as runtime:
        values = runtime.run({"image": pixels}, ["probs", "classLabel"])
    assert values["classLabel"] == labels[values["probs"].argmax()]
    assert values["probs"].sum() == pytest.approx(1, abs=1e-6)
    with load(exported.path) as model:
        assert model.predict([pixels[0]])[0][0].label.startswith("kind ")
        assert all(check.ok for check in model.selftest())


@pytest.fixture(scope="module")
def several(micro, bundle_of):
    """Two sizes in one package."""
    return bundle_of(micro, plan_for(**SIZES))


@pytest.mark.slow
def test_several_sizes_are_functions_that_share_weights(several, micro, coreml_bundle):
    assert several.path.name == "micro_64-coreml-fp16-32x32+48x48"
    functions = several.manifest.details["functions"]
    assert functions == [{"name": "imgsz_32x32", "imgsz": [32, 32]}, {"name": "imgsz_48x48", "imgsz": [48, 48]}]
    weights = "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    assert several.manifest.files[weights]["size_bytes"] <= 1.15 * coreml_bundle.manifest.files[weights]["size_bytes"]
    assert {scan["lowering"] for scan in several.manifest.parity["scans"]} == {"portable", "portable 48x48"}
    module = with_pre_and_postprocessing(load_checkpoint(micro), plan_for(), Preprocessing((64, 64)))
    for function in functions:
        height, width = function["imgsz"]
        pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
        with torch.inference_mode(), MilRuntime(several.path / "model.mlpackage", function["name"]) as runtime:
            want = module(torch.from_numpy(pixels))[0].numpy()
            assert np.abs(runtime.run({"image": pixels})["logits"] - want).max() < 2e-2
    facts = coremltools().utils.load_spec(str(several.path / "model.mlpackage")).description.metadata.userDefined
    assert facts["checkpoint_sha256"] == sha256(micro.read_bytes()).hexdigest()
    assert "`imgsz_32x32`, the default, `imgsz_48x48`" in (several.path / "README.md").read_text()
    with load(several.path) as loaded:
        assert loaded.inputs["image"].shape == (1, 32, 32, 3)
        assert all(check.ok for check in loaded.selftest())


@pytest.mark.slow
def test_the_same_bytes_from_another_process(several, micro, tmp_path):
    code = "from evm_deploy.cli import export_main; raise SystemExit(export_main())"
    flags = ["--target", "coreml", "--imgsz", "32,48", "--min-target", "iOS18", "-o", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, str(micro), *flags], capture_output=True, text=True)
    assert done.returncode == 0
    assert not re.search("warn|error|%\\||not been tested", done.stderr, re.I), done.stderr  # our steps alone
    (again,) = tmp_path.iterdir()
    theirs = json.loads((again / "manifest.json").read_text())["files"]
    packages = [name for name in theirs if "mlpackage" in name]
    assert packages and not [name for name in packages if theirs[name] != several.manifest.files[name]]


BAD_PLANS = {
    "dynamic batch": ({"batch": Batch.parse("dynamic")}, "one batch size"),
    "batch of images": ({"batch": Batch(2, 2, 2)}, "takes one image(?s:.*)--input tensor"),
    "native library": ({"native_library": "macos-arm64"}, "has no native library for --platform; it has: none"),
    "native scan": ({"scan": "plugin"}, "has no scan lowering 'plugin'; it has: auto, portable"),
    "opset": ({"opset": 20}, "Core ML programs have no ONNX opset"),
    "smoothing": ({"precision": "int8", "calib": "x", "smooth": "on"}, "quantised without smoothing"),
    "sizes": ({"more_imgsz": ((32, 32),)}, "from iOS18 on(?s:.*)--min-target iOS18"),
    "a size that is too small": ({**SIZES, "more_imgsz": ((2, 64),)}, "2x64 is too small"),
    "sizes in int8": ({**SIZES, "precision": "w8"}, "a package in w8 takes one --imgsz"),
    "labels": ({"labels": ("a", "b")}, "2 labels for a head of 10 classes"),
    "labels twice": ({"labels": ("a",) * 10, "head": "probs"}, "label 'a' occurs twice"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_plans_that_core_ml_does_not_have(name, micro, tmp_path):
    changes, message = BAD_PLANS[name]
    with pytest.raises(UsageError, match=message):
        export(micro, plan_for(**changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_targets_have_no_minimum_system_and_one_size(micro, tmp_path):
    with pytest.raises(UsageError, match="an artifact of target 'onnx' takes one --imgsz"):
        export(micro, replace(plan_for(more_imgsz=((32, 32),)), target="onnx"), tmp_path)
    with pytest.raises(UsageError, match="names a size twice"):
        plan_for(more_imgsz=((64, 64),))
    with pytest.raises(UsageError, match="target 'onnx' has no minimum system 'iOS17'; it has: none"):
        export(micro, replace(plan_for(min_target="iOS17"), target="onnx"), tmp_path)
    with pytest.raises(UsageError, match="did you mean iOS17"):
        plan_for(min_target="ios17")


def test_a_missing_coremltools_exits_3(micro, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evm_deploy._util.packages.find_spec", lambda name: None if name == "coremltools" else object())
    assert cli.export_main([str(micro), "--target", "coreml", "-o", str(tmp_path / "out")]) == 3
    assert install_hint("coreml") in capsys.readouterr().err


@pytest.mark.slow
def test_core_ml_is_told_the_inputs_and_outputs_of_the_mil_runtime(coreml_bundle, micro, tmp_path):
    """A bundle's manifest has the inputs and outputs that Core ML knows; a Mac would refuse others."""
    labels = tuple("abcdefghij")
    classifier = export(micro, plan_for(head="probs", labels=labels), tmp_path)
    features = export(micro, plan_for(head="features", input="tensor"), tmp_path / "features")
    for bundle in (coreml_bundle, classifier, features):
        package = bundle.path / "model.mlpackage"
        description = coremltools().models.utils.load_spec(str(package)).description
        with MilRuntime(package) as runtime:
            told = (*runtime.inputs.values(), *runtime.outputs.values())
        given = (tensor_spec(value, len(labels)) for value in (*description.input, *description.output))
        assert [spec for spec in given if spec] == list(told)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is here")
def test_core_ml_itself_needs_a_mac(coreml_bundle, capsys):
    with pytest.raises(ToolchainError, match=r"Core ML runs on Apple systems only(?s:.*)evm_deploy.runtimes.mil"):
        CoreMlRuntime(coreml_bundle.path / "model.mlpackage")
    assert cli.run_main([str(coreml_bundle.path), "--selftest"]) == 0
    streams = capsys.readouterr()
    assert "PASSED" in streams.out and "the MIL runtime computes the same outputs" in streams.err
    assert cli.run_main([str(coreml_bundle.path), "--selftest", "--scan", "plugin"]) == 2


def test_the_benchmark_in_the_bundle_says_that_it_needs_a_mac(coreml_bundle):
    done = subprocess.run([sys.executable, coreml_bundle.path / "bench_on_mac.py"], capture_output=True, text=True)
    assert sys.platform == "darwin" or (done.returncode, done.stdout) == (3, "")
    assert "Core ML runs on Apple systems only" in done.stderr and "bench_on_mac.py" in coreml_bundle.manifest.files


class MacStub:
    """Stand-in for the part of coremltools that bench_on_mac.py uses."""

    __version__ = "9.0"

    class MLModel:
        def __init__(self, path, compute_units):
            assert Path(path).is_dir() and compute_units == 3

        def predict(self, feeds):
            time.sleep(0.002)
            assert feeds["image"].size == (64, 64)

    models = SimpleNamespace(MLModel=MLModel)


def check_record(bundle, found, folder):
    (folder / "bench.json").write_text(
        json.dumps(bench_on_mac.make_record(bundle.path, MacStub, "CPU_AND_NE", found, 5.0))
    )
    record = Record.read(folder / "bench.json")
    assert record.summary_ms["p50"] >= 2.0 and record.settings["device"] == "CPU_AND_NE"
    assert record.bundle["artifact_bytes"] == bundle.size_bytes
    assert set(record.settings) == set(Settings().as_dict())
    assert set(record.device) == {"at", "profile", *device.facts()}
    return record


def test_the_benchmark_in_the_bundle_gives_a_record(coreml_bundle, tmp_path, monkeypatch):
    """On a stand-in for coremltools on a Mac."""
    monkeypatch.setattr(bench_on_mac, "compute_plan", lambda model, units, function: {"operations": {function: 1}})
    manifest = json.loads((coreml_bundle.path / "manifest.json").read_text())
    found = bench_on_mac.on_mac(MacStub, coreml_bundle.path, manifest, 3, 5.0)
    assert check_record(coreml_bundle, found, tmp_path).runtime["plan"] == {"operations": {"main": 1}}
    assert "latency.py" in coreml_bundle.manifest.files


def test_the_benchmark_on_a_phone_gives_a_record(coreml_bundle, tmp_path, monkeypatch):
    """On stand-ins for the phone and for coremltools' app on it, whose names and arguments are coremltools' own."""
    from coremltools.models.ml_program.experimental import perf_utils, remote_device

    real = perf_utils.MLModelBenchmarker
    kinds = remote_device.DeviceType

    class Phone:
        name, type, os_version = "My iPhone", kinds.IPHONE, "18.1"

        async def prepare_for_model_debugging(self, credentials):
            assert credentials.development_team == "TEAM"
            return self

    class Benchmarker:
        def __init__(self, *args):
            inspect.signature(real.__init__).bind(self, *args)

        async def benchmark_load(self, **options):
            inspect.signature(real.benchmark_load).bind(self, **options)
            return SimpleNamespace(samples=[30.0, 20.0])

        async def benchmark_predict(self, *args, **options):
            inspect.signature(real.benchmark_predict).bind(self, *args, **options)
            return SimpleNamespace(samples=[2.0 + 0.01 * (i % 7) for i in range(options["iterations"])])

    monkeypatch.setattr(perf_utils, "MLModelBenchmarker", Benchmarker)
    phones = [Phone()]
    monkeypatch.setattr(remote_device.Device, "get_connected_devices", staticmethod(lambda kind: phones))
    manifest = json.loads((coreml_bundle.path / "manifest.json").read_text())
    run = lambda: asyncio.run(bench_on_mac.on_iphone(MacStub, coreml_bundle.path, manifest, 3, "TEAM"))  # noqa: E731
    record = check_record(coreml_bundle, run(), tmp_path)
    assert record.stable and record.device["system"] == "iOS 18.1" and record.load_ms == {"fresh": 30.0, "again": 20.0}
    phones.clear()
    with pytest.raises(SystemExit, match="no iPhone is connected"):
        run()


@pytest.mark.slow
def test_a_self_test_leaves_the_bundle_as_it_was(micro, tmp_path, capsys):
    """coremltools writes the manifest of every package that it opens."""
    bundle = export(micro, ExportPlan("coreml", imgsz=(64, 64)), tmp_path)
    for _ in range(2):
        assert cli.run_main([str(bundle.path), "--selftest"]) == 0, capsys.readouterr().err
    open_bundle(bundle.path)


def test_a_damaged_package_in_a_bundle(coreml_bundle, tmp_path):
    copy = shutil.copytree(coreml_bundle.path, tmp_path / "bundle")
    weights = copy / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match=r"weight.bin is damaged"):
        load(copy)


@pytest.mark.slow
@pytest.mark.retraces
def test_the_cast_patch_is_still_needed(monkeypatch, coreml_fp32):
    """The day that coremltools takes NumPy's one-element arrays, coreml_tools._patch_cast can go."""
    from coremltools.converters.mil.frontend.torch import ops

    converter()
    monkeypatch.setattr(ops, "_cast", ops._cast.__wrapped__)
    _, module, plan = coreml_fp32
    with pytest.raises(ToolchainError, match="only 0-dimensional arrays can be converted to Python scalars"):
        mlprogram.trace(module, plan, {})


def test_the_patch_is_for_one_version_alone(monkeypatch):
    patched = []
    monkeypatch.setattr(coremltools_patch, "_patch_cast", lambda: patched.append(1))
    for version, numpy, expected in (("9.0", "2.4.6", 1), ("9.0", "2.3.9", 1), ("9.1", "2.4.6", 1)):
        monkeypatch.setattr(coremltools_patch.metadata, "version", lambda name, version=version: version)
        monkeypatch.setattr(coremltools_patch.np, "__version__", numpy)
        coremltools_patch.converter.__wrapped__()
        assert len(patched) == expected, (version, numpy)


@pytest.mark.slow
@pytest.mark.retraces
def test_a_program_that_is_checked_rarely_is_the_same_and_is_checked(monkeypatch, coreml_fp32):
    from coremltools.converters.mil.mil import Block, Program

    _, module, plan = coreml_fp32
    rarely = mlprogram.trace(module, plan, {})
    with monkeypatch.context() as patch:
        patch.setattr(Program, "validate", Program.validate.__wrapped__)  # after every pass
        assert mlprogram.trace(module, plan, {}).sha256 == rarely.sha256

    def wrong(*args, **options):
        raise ValueError("a wrong program")

    monkeypatch.setattr(Block, "validate", wrong)
    with pytest.raises(ToolchainError, match="a wrong program"):
        mlprogram.trace(module, plan, {})

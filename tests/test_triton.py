"""Bundles as models of Triton Inference Server: config.pbtxt by Triton's own schema, and what its backends compare.

No server runs here. `served` does what onnxruntime_backend does with a model: it reads config.pbtxt, compares names,
types and dims with the file, registers the libraries that the file names, and infers.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from safetensors.numpy import load_file

from evm_deploy import cli
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.bundle import Bundle, check_free, open_bundle, seal
from evm_deploy.bundle.loaded import load
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.export import triton
from evm_deploy.export.layouts import LAYOUTS, parse_layout
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target, load_targets
from evm_deploy.runtimes.base import Batch
from evm_deploy.toolchain import cross_compile
from evm_deploy.toolchain.platforms import host_platform
from evm_deploy.toolchain.plugins import find_plugin
from tests.toolchains import need

TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}
TYPES |= {"tensor(int64)": "TYPE_INT64"}


@pytest.fixture(scope="module")
def schema():
    """Triton's messages, without the client around them: that needs grpc."""
    need("Triton's schema")
    package = importlib.util.find_spec("tritonclient").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(package, "grpc", "model_config_pb2.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(bundle_of) -> Bundle:
    return bundle_of(CHECKPOINT, ExportPlan("onnx", layout="triton"))


@pytest.fixture
def arranged(tmp_path):
    """arranged(bundle) -> a copy of a bundle in the layout."""

    def make(bundle: Bundle | Path) -> Bundle:
        bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        folder = tmp_path / bundle.path.name
        shutil.copytree(bundle.path, folder)
        (folder / "manifest.json").unlink()
        seal(folder, triton.arrange(folder, bundle.manifest, f"/models/{folder.name}"))
        return open_bundle(folder)

    return make


def read(schema, bundle: Bundle):
    return text_format.Parse((bundle.path / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def served(schema, bundle: Bundle, root: str = "/models"):
    """Return the message, and a session of the bundle's model as Triton's backend opens it."""
    config = read(schema, bundle)
    options = onnxruntime.SessionOptions()
    for name in config.model_operations.op_library_filename:
        options.register_custom_ops_library(str(bundle.path / Path(name).relative_to(f"{root}/{bundle.path.name}")))
    session = onnxruntime.InferenceSession(bundle.path / "1" / "model.onnx", options)
    assert config.backend == "onnxruntime"
    for ours, theirs in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [each.name for each in ours] == [each.name for each in theirs]
        for tensor, value in zip(ours, theirs, strict=True):
            shape = [side if isinstance(side, int) else -1 for side in value.shape]
            assert [-1] * bool(config.max_batch_size) + list(tensor.dims) == shape, tensor
            assert schema.DataType.Name(tensor.data_type) == TYPES[value.type]
    return config, session


def same_as_the_selftest(bundle: Bundle, session, batch: int | None = 1) -> None:
    """All probes (of the batch, or `None` for all at once) through the session, as the self-test expects them."""
    probes, name = load_file(bundle.path / "selftest" / "probes.safetensors"), bundle.manifest.input
    step = batch or len(probes[name])
    for start in range(0, len(probes[name]), step):
        outputs = session.run(None, {name: probes[name][start : start + step]})
        for value, found in zip(session.get_outputs(), outputs, strict=True):
            expected = probes[value.name][start : start + step]
            assert np.abs(found - expected).max() <= bundle.manifest.limit("outputs", value.name)


def test_a_model_of_the_repository_is_a_bundle(schema, demo, tmp_path):
    config, session = served(schema, demo)
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [1, 64, 64, 3]
    assert not config.HasField("dynamic_batching") and not config.HasField("model_operations") and not config.name
    assert (demo.path / config.output[0].label_filename).read_text().split() == list("0123456789")
    same_as_the_selftest(demo, session)
    assert demo.manifest.artifact == "1/model.onnx" and {"config.pbtxt", "1/model.onnx"} <= set(demo.manifest.files)
    assert not (demo.path / "model.onnx").exists() and "`1/model.onnx`" in (demo.path / "README.md").read_text()
    assert "| `config.pbtxt` | configuration of the model for Triton" in (demo.path / "README.md").read_text()
    assert any("--platform linux-x86_64" in note for note in demo.manifest.notes)
    assert [each.name for each in demo.path.iterdir() if each.is_dir() and each.name.isdigit()] == ["1"]
    shutil.copytree(demo.path, tmp_path / "moved")
    for path in (demo.path, write_zip(tmp_path / "moved")):
        with load(path) as model:
            assert all(check.ok for check in model.selftest())


def test_the_library_is_loaded_by_the_path_in_the_file(schema, tmp_path, monkeypatch):
    monkeypatch.setattr(cross_compile, "zig_version", lambda: "none: the installed library stands in")
    monkeypatch.setattr(cross_compile, "library", lambda runtime, platform: find_plugin(runtime))
    plan = ExportPlan("onnx", native_library=host_platform(), layout="triton:/srv/models")
    bundle = export(CHECKPOINT, plan, tmp_path)
    config, session = served(schema, bundle, "/srv/models")
    (name,) = config.model_operations.op_library_filename
    assert name.startswith(f"/srv/models/{bundle.path.name}/plugins/{host_platform()}/")
    assert not any("--platform" in note for note in bundle.manifest.notes)
    same_as_the_selftest(bundle, session)
    image = load_file(bundle.path / "selftest" / "probes.safetensors")["image"][:1]
    with load(bundle.path) as model:
        assert np.array_equal(session.run(None, {"image": image})[0], model.run({"image": image})["logits"])
        assert all(check.ok for check in model.selftest())


@pytest.mark.slow
def test_a_range_of_batches_is_batched_by_the_server(schema, bundle_of):
    plan = ExportPlan("onnx", batch=Batch(1, 2, 4), layout="triton:/srv/models")
    config, session = served(schema, bundle := bundle_of(CHECKPOINT, plan))
    assert config.max_batch_size == 4 and config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [64, 64, 3] and config.output[0].label_filename
    same_as_the_selftest(bundle, session, None)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "w8"])
def test_every_precision_has_the_types_of_its_file(schema, bundle_of, precision):
    calib = {} if precision == "fp16" else {"calib": "demo", "calib_images": 120}
    plan = ExportPlan("onnx", precision, layout="triton", **calib)
    _, session = served(schema, bundle := bundle_of(CHECKPOINT, plan))
    same_as_the_selftest(bundle, session)


@pytest.mark.slow
@pytest.mark.parametrize("nms", ["graph", "none"])
def test_detectors_have_no_labels_on_their_outputs(schema, detector_bundles, arranged, nms):
    bundle = arranged(detector_bundles[nms])
    config, _ = served(schema, bundle)
    assert config.max_batch_size == 0 and config.input[0].dims[0] == 2 and len(config.output) >= 3
    assert not any(output.label_filename for output in config.output)
    assert (bundle.path / "labels.txt").is_file()


@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_segmenters_have_the_type_of_their_map(schema, segmenter_bundles, arranged, resize):
    config, _ = served(schema, arranged(segmenter_bundles[resize]))
    assert schema.DataType.Name(config.output[0].data_type) == {"pad": "TYPE_UINT8", "stretch": "TYPE_INT32"}[resize]
    assert not config.output[0].label_filename


@pytest.mark.slow
def test_an_ir_lies_beside_its_weights(schema, bundle_of):
    plan = ExportPlan("openvino", scan="portable", batch=Batch(1, 2, 4), layout="triton")
    bundle = bundle_of(CHECKPOINT, plan)
    config = read(schema, bundle)
    assert config.backend == "openvino" and config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [-1, 64, 64, 3] and list(config.output[0].dims) == [-1, 10]
    assert sorted(each.name for each in (bundle.path / "1").iterdir()) == ["model.bin", "model.xml"]
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())


def test_other_shapes(schema, demo_bundle):
    """Scalars, dims that are unknown, and names with quotes: not of our networks, but of --outputs and of others."""
    tensor = {"name": 'a"b\\\n街', "dtype": "int64", "shape": [None]}
    odd = replace(demo_bundle.manifest, outputs=[tensor, {"name": "n", "dtype": "bool", "shape": [None, None, 4]}])
    batched = replace(odd, plan={**odd.plan, "batch": "1:4:8"}, inputs=[{**tensor, "shape": [None, 3]}])
    config = text_format.Parse(triton.config(batched, '/m"\\'), schema.ModelConfig())
    assert config.output[0].name == tensor["name"] and list(config.output[0].dims) == [1]
    assert config.output[0].HasField("reshape") and not config.output[0].reshape.shape
    assert list(config.output[1].dims) == [-1, 4] and config.max_batch_size == 8
    fixed = replace(odd, outputs=[{"name": "s", "dtype": "float16", "shape": []}])
    assert list(text_format.Parse(triton.config(fixed, "/m"), schema.ModelConfig()).output[0].dims) == [1]
    with pytest.raises(UsageError, match="has no batch"):
        triton.config(replace(batched, outputs=[{**tensor, "shape": [3]}]), "/m")
    with pytest.raises(UsageError, match="is complex64, which Triton does not have"):
        triton.config(replace(odd, outputs=[{**tensor, "dtype": "complex64"}]), "/m")


def test_every_type_is_one_of_tritons(schema):
    assert set(triton.DATA_TYPES.values()) <= set(schema.DataType.keys())
    for name in triton.DATA_TYPES:
        assert np.dtype(name).itemsize


@pytest.mark.parametrize("target", sorted(set(load_targets()) - set(triton.BACKENDS)))
def test_other_targets_are_refused(target):
    with pytest.raises(UsageError, match=f"not of {target}") as error:
        check_plan(get_target(target), ExportPlan(target, layout="triton"))
    assert "--target onnx or openvino" in error.value.hint


@pytest.mark.parametrize(
    ("plan", "hint"),
    [
        (ExportPlan("onnx", batch="dynamic", layout="triton"), "--batch 1:4:8"),
        (ExportPlan("onnx", batch="2:4:8", layout="triton"), "--batch 1:4:8"),
        (ExportPlan("onnx", native_library="macos-arm64", layout="triton"), "--platform linux-x86_64"),
        (ExportPlan("openvino", layout="triton"), "--scan portable"),
        (ExportPlan("openvino", scan="plugin", layout="triton"), "--scan portable"),
        (ExportPlan("onnx", layout="tritom"), "triton"),
        (ExportPlan("onnx", layout="triton:models"), "--layout triton:/models"),
        (ExportPlan("onnx", layout="triton:"), "--layout triton:/models"),
        (ExportPlan("onnx", layout="triton:/a\nb"), "--layout triton:/models"),
    ],
)
def test_plans_that_triton_cannot_serve_are_refused_with_a_cure(plan, hint):
    with pytest.raises(UsageError) as error:
        check_plan(get_target(plan.target), plan)
    assert hint in f"{error.value} {error.value.hint}"


def test_the_flag_is_checked_before_work_starts(tmp_path, capsys):
    flags = ["--layout", "triton", "-o", str(tmp_path), "--dry-run"]
    assert cli.export_main(["--target", "onnx,coreml", *flags]) == 2
    assert "takes bundles of onnx and openvino, not of coreml" in capsys.readouterr().err
    assert cli.export_main(["--target", "onnx", "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["Bundle"] == f"{tmp_path}/evm_digits-onnx-fp32-64x64"


def test_only_what_an_export_wrote_is_replaced(demo, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(demo.path, path)
    check_free(path, force=True)
    with pytest.raises(BundleError, match="exists"):
        check_free(path, force=False)
    (path / "2").mkdir()
    (path / "2" / "model.onnx").write_bytes(b"version of somebody else")
    with pytest.raises(BundleError, match=r"holds 2/model\.onnx, which is not part of the bundle"):
        check_free(path, force=True)


def test_a_layout_has_a_folder_on_the_server():
    for name, layout in LAYOUTS.items():
        assert parse_layout(name) == (layout, parse_layout(f"{name}:{layout.root}")[1])
    assert str(parse_layout("triton:/srv/models/")[1]) == "/srv/models"

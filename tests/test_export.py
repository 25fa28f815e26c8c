"""Exports of real checkpoints, run by plain onnxruntime with nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256

import golden
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from evm_deploy.errors import UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from tests.conftest import save_as_released


def plain_session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


CUSTOM_STATE = golden.seeded_state(golden.state_shapes(24, (1, 2, 3, 1), 20), 5)


SQUARE, ODD = ((224, 224), "dynamic"), ((200, 232), "3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "imgsz", "batch"),
    [
        *((name, *SQUARE) for name in ("tiny_224", "small_224", "base_224", "custom_24")),
        *((name, *ODD) for name in ("tiny_224", "custom_24")),
    ],
)
def test_plain_onnxruntime_matches(name, imgsz, batch, checkpoint, tmp_path):
    """Against the golden logits where the authors' code made some, else against our golden-checked torch model."""
    path = save_as_released(CUSTOM_STATE, tmp_path / "c.ckpt") if name == "custom_24" else checkpoint(name)
    bundle = export(path, ExportPlan("onnx", imgsz=imgsz, batch=Batch.parse(batch), input="tensor"), tmp_path)
    images = golden.seeded_images((3, 3, *imgsz), 1)
    if imgsz == (224, 224) and name != "custom_24":
        case = golden.model_case(name)
        images, logits = case["images"], case["logits"]
    else:
        model, _ = load_checkpoint(path)
        with torch.inference_mode():
            logits = model(torch.from_numpy(images)).numpy()
    session = plain_session(bundle.path / "model.onnx")
    assert np.abs(session.run(None, {"tensor": images})[0] - logits).max() < 1e-4
    if batch == "dynamic":
        assert np.abs(session.run(None, {"tensor": images[:1]})[0] - logits[:1]).max() < 1e-4


@pytest.mark.slow
def test_odd_golden_case_batch_1(checkpoint, tmp_path):
    case = golden.model_case("tiny_odd_200x232")
    plan = ExportPlan("onnx", imgsz=(200, 232), input="tensor")
    bundle = export(checkpoint("tiny_odd_200x232"), plan, tmp_path)
    got = plain_session(bundle.path / "model.onnx").run(None, {"tensor": case["images"]})[0]
    assert np.abs(got - case["logits"]).max() < 1e-4


@pytest.mark.parametrize(
    ("scan", "imgsz"), [("auto", (33, 47)), ("auto", (90, 70)), ("portable", (4, 4)), ("portable", (33, 47))]
)
@pytest.mark.slow
def test_image_input_and_odd_grids(imgsz, scan, micro, tmp_path):
    """uint8 pixels through the artifact equal normalised pixels through the torch model."""
    bundle = export(micro, ExportPlan("onnx", imgsz=imgsz, scan=scan, batch=Batch(1, 2, 4)), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *imgsz, 3), np.uint8)
    got = plain_session(bundle.path / "model.onnx").run(None, {"image": pixels})[0]
    model, _ = load_checkpoint(micro)
    with torch.inference_mode():
        want = model(torch.from_numpy(bundle.manifest.preprocess().normalise(pixels))).numpy()
    assert np.abs(got - want).max() < 1e-4


@pytest.mark.slow
def test_probabilities_and_features(micro, tmp_path):
    probs = export(micro, ExportPlan("onnx", imgsz=(64, 64), head="probs"), tmp_path / "p")
    maps = export(micro, ExportPlan("onnx", imgsz=(90, 70), head="features"), tmp_path / "f")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    assert plain_session(probs.path / "model.onnx").run(None, {"image": pixels})[0].sum() == pytest.approx(1, abs=1e-5)
    shapes = [tuple(o["shape"]) for o in maps.manifest.outputs]
    assert shapes == [(1, 16, 22, 17), (1, 32, 11, 9), (1, 64, 6, 5), (1, 128, 3, 3)]
    assert any("outnorm" in note for note in maps.manifest.notes)


def test_fp16_keeps_the_scan_in_float32(micro, micro_bundle, tmp_path):
    bundle = export(micro, ExportPlan("onnx", imgsz=(64, 64), precision="fp16"), tmp_path)
    assert bundle.size_bytes < 0.65 * micro_bundle.size_bytes
    model = onnx.shape_inference.infer_shapes(onnx.load(str(bundle.path / "model.onnx")))
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    scans = [node for node in model.graph.node if node.op_type == "SelectiveScan"]
    assert len(scans) == 2
    for node in scans:
        assert all(kinds.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT for name in node.input)
    assert bundle.manifest.inputs[0]["dtype"] == "uint8"


@pytest.mark.slow
def test_fp16_refuses_weights_that_overflow(tmp_path):
    state = dict(golden.model_case("micro_64")["state"])
    state["layers.2.1.conv_pw.0.weight"] = state["layers.2.1.conv_pw.0.weight"] * 1e7
    path = save_as_released(state, tmp_path / "big.ckpt")
    with pytest.raises(UsageError, match=r"the largest float16 is 65504"):
        export(path, ExportPlan("onnx", imgsz=(64, 64), precision="fp16"), tmp_path)
    assert list(tmp_path.glob("*")) == [path]


def test_one_node_per_block_and_inside_one_per_scan_named_after_their_modules(micro_bundle):
    model = onnx.load(str(micro_bundle.path / "model.onnx"))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and all("/" in name for name in names)
    assert [n for n in names if n.endswith("EVSSBlock")] == [f"layers.{i}.blocks.0/EVSSBlock" for i in (0, 1)]
    assert "layers.2.1.conv_pw.0/Conv" in names
    functions = {(f.domain, f.name, f.overload): [node.name for node in f.node] for f in model.functions}
    assert set(functions) == {("evm", "SelectiveScan", ""), ("evm", "EVSSBlock", "")}
    assert {"op/SelectiveScan", "op.out_proj/MatMul", "se.global_reduce/Gemm"} <= set(functions["evm", "EVSSBlock", ""])
    everything = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert not {"Einsum", "ScatterND", "BatchNormalization"} & {node.op_type for node in everything}
    assert {p.key for p in model.metadata_props} >= {"checkpoint_sha256", "preprocessing", "input", "head"}


@pytest.mark.parametrize("opset", [18, 21, 23])
@pytest.mark.slow
def test_other_opsets(opset, micro, tmp_path):
    bundle = export(micro, ExportPlan("onnx", imgsz=(32, 32), opset=opset), tmp_path)
    model = onnx.load(str(bundle.path / "model.onnx"))
    assert {o.domain: o.version for o in model.opset_import}[""] == opset


@pytest.mark.slow
def test_same_inputs_give_the_same_bytes_from_any_folder(micro, micro_bundle, tmp_path):
    """In another process, from another working directory."""
    command = [
        sys.executable,
        "-c",
        "from evm_deploy.cli import export_main; raise SystemExit(export_main())",
    ]
    command += [str(micro), "--target", "onnx", "--imgsz", "64", "-o", str(tmp_path / "out")]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    again = tmp_path / "out" / micro_bundle.path.name
    for name in ("model.onnx", "selftest/scan.onnx"):
        a, b = (sha256((folder / name).read_bytes()).hexdigest() for folder in (again, micro_bundle.path))
        assert a == b, name

"""Exported segmenters: against mmseg's label maps in every runtime, mistakes that verification rejects, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from evm_deploy import load
from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export.hub.scans import OnnxScanAccess
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import make_test_inputs
from evm_deploy.export.source import Source
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.export.verify import verify
from evm_deploy.model import segmentation
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks.segmentation import SEGMENTATION
from tests import segmenters
from tests.toolchains import need

SIZE = (72, 104)
ODD = "upernet_micro_picture"  # 190 pixels wide: no multiple of 4
FORMS = [
    *((name, "onnx", scan) for name in ("upernet_micro", ODD) for scan in ("auto", "portable")),
    *((name, "openvino", scan) for name in ("upernet_micro", ODD) for scan in ("plugin", "portable")),
    *((name, "trt", "portable") for name in ("upernet_micro", ODD)),
    (ODD, "coreml", "auto"),
]


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory):
    """A golden UPerNet on disk, with class names and a palette."""
    return segmenters.named(tmp_path_factory.mktemp("segmenter"))


def is_golden(label_map, case, precision="fp32"):
    for j, each in enumerate(label_map):
        margin = case.expected[f"image{j}/margin_input"]
        same = each == case.expected[f"image{j}/map_input"]
        assert same[margin > {"fp32": 1e-3, "fp16": 0.02}[precision]].all()
        assert same.mean() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target", "scan"), FORMS)
def test_an_artifact_gives_the_label_maps_of_mmseg(name, target, scan, tmp_path):
    if target == "coreml":
        need("coremltools")
    case = segmenters.case(name)
    batch, *_, height, width = case.inputs.shape
    plan = ExportPlan(target, "fp32", imgsz=(height, width), batch=batch, input="tensor", scan=scan)
    artifact, plan = segmenters.artifact(tmp_path, segmenters.saved(tmp_path, name), plan)
    label_map = segmenters.label_map(artifact, plan, case.inputs)
    assert label_map.dtype == (np.int32 if target == "coreml" else np.uint8)
    is_golden(label_map, case)


@pytest.mark.slow
def test_a_network_of_published_size_with_150_classes(tmp_path):
    """C5 is 5x7, smaller than the six bins of the pooling."""
    case = segmenters.case("upernet_tiny_136x200")
    plan = ExportPlan("onnx", imgsz=(136, 200), input="tensor")
    artifact, plan = segmenters.artifact(tmp_path, segmenters.saved(tmp_path, "upernet_tiny_136x200"), plan)
    is_golden(segmenters.label_map(artifact, plan, case.inputs), case)
    nodes = onnx.load(artifact.path).graph.node
    assert not any(node.op_type == "BatchNormalization" for node in nodes), "folded into the convolutions"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "scan", "batch"), [("onnx", "auto", 2), ("openvino", "portable", 2), ("coreml", "auto", 1)]
)
def test_an_export_in_float16_is_verified_and_compares_in_float32(target, scan, batch, segmenter, bundle_of):
    if target == "coreml":
        need("coremltools")
    bundle = bundle_of(segmenter, ExportPlan(target, "fp16", imgsz=SIZE, scan=scan, batch=batch))
    parity = bundle.manifest.parity
    assert parity["ok"] and parity["top1_agreement"] > 0.99 and parity["max_abs"] < parity["limit"]
    assert bundle.manifest.palette == tuple(map(tuple, segmenters.PALETTE))
    text = (bundle.path / "README.md").read_text(encoding="utf-8")
    assert "the class index of each pixel of the 72x104 input" in text and "model.details.palette" in text
    assert ("model.segment(rgb, width, height)" in text) == (target != "coreml")  # which has no C++
    if target == "onnx":
        graph = onnx.shape_inference.infer_shapes(onnx.load(bundle.path / "model.onnx")).graph
        half = {v.name for v in graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
        half |= {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16}
        own = [node for node in graph.node if node.name.startswith("selection/")]
        assert half and own and not half & {name for node in own for name in (*node.input, *node.output)}


@pytest.mark.slow
@pytest.mark.retraces
def test_one_class_aligned_corners_strips_and_any_batch(tmp_path, monkeypatch):
    """The rarer forms at once: sigmoid and threshold, matrices for every resize, strips, a dynamic batch of images."""
    monkeypatch.setattr(segmentation, "STRIP_BYTES", 4 * 104 * 11)
    path = segmenters.binary(tmp_path, align_corners=True, threshold=0.4)
    plan = ExportPlan("onnx", imgsz=SIZE, batch="dynamic")
    artifact, plan = segmenters.artifact(tmp_path, path, plan)
    preprocessing = complete(plan, load_checkpoint(path)[1])[1]
    images = make_test_inputs(plan, preprocessing, 3)
    model, _ = load_checkpoint(path)
    with torch.inference_mode():
        selection = model.selection(None, SIZE)
        logits = model(torch.from_numpy(preprocessing.normalise(images)))
    scores = torch.sigmoid(F.interpolate(logits, SIZE, mode="bilinear", align_corners=True))[:, 0].numpy()
    clear = np.abs(scores - 0.4) > 1e-4
    assert len(selection.strips) == 7 and 0.05 < (scores > 0.4).mean() < 0.95
    for count in (3, 1):
        label_map = segmenters.label_map(artifact, plan, images[:count])
        assert (label_map == (scores > 0.4)[:count])[clear[:count]].all()


# --------------------------------------------------------------------------------- mistakes put in on purpose


def resized(logits, size, **how):
    return F.interpolate(logits, size, **({"mode": "bilinear", "align_corners": False} | how))


def nearest(label_map):
    return F.interpolate(label_map[:, None].float(), SIZE, mode="nearest")[:, 0].to(torch.uint8)


HALF = (36, 52)
MISTAKES = {
    "classes compared at a quarter of the size": lambda x: nearest(x.argmax(1)),
    "corners aligned at the end": lambda x: resized(x, SIZE, align_corners=True).argmax(1),
    "classes compared before the last resize": lambda x: nearest(resized(x, HALF).argmax(1)),
    "two resizes in place of one": lambda x: resized(resized(x, HALF), SIZE).argmax(1),
    "resized to the nearest": lambda x: resized(x, SIZE, mode="nearest", align_corners=None).argmax(1),
    "half a pixel aside": lambda x: torch.roll(resized(x, (144, 208)), 1, 3)[:, :, ::2, ::2].argmax(1),
    "the second best class": lambda x: resized(x, SIZE).topk(2, 1).indices[:, 1],
    "classes from one": lambda x: resized(x, SIZE).argmax(1) + 1,
    "a row aside": lambda x: resized(x, SIZE).argmax(1).roll(1, 1),
}


class Artifact:
    """A runtime, and the access to its scans, whose artifact is a torch module with another choice of classes."""

    names = ()

    def __init__(self, network, choose, change=lambda logits: logits):
        self.inputs = {"tensor": SimpleNamespace(dtype="float32", shape=(None, 3, *SIZE), name="tensor")}
        self._network, self._choose, self._change = network, choose, change

    def with_layer(self, path, feeds):
        with torch.inference_mode():
            logits = self._change(self._network(torch.from_numpy(feeds["tensor"])))
            return {"label_map": self._choose(logits).to(torch.uint8).numpy(), path: logits.numpy()}

    def run(self, feeds):
        return {"label_map": self.with_layer("", feeds)["label_map"]}

    def in_situ(self, feeds):
        return []


@pytest.fixture(scope="module")
def verified(segmenter):
    """verified(precision, choose, change) -> Parity of an artifact that chooses classes and changes logits so."""
    source = Source(segmenter)
    plans = {
        precision: check_plan(get_target("onnx"), ExportPlan("onnx", precision, imgsz=SIZE, input="tensor"))
        for precision in ("fp32", "fp16")
    }
    plan, preprocessing = complete(plans["fp32"], source.network(plans["fp32"]).spec)
    reference = source.float_run(plan, preprocessing)
    reference.scans.clear()
    module = source.network(plan).module

    def check(precision, choose, change=lambda logits: logits):
        artifact = Artifact(module, choose, change)
        return verify(reference, artifact, artifact, plans[precision], SEGMENTATION, float16=False)

    return check


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_right_classes_are_accepted(precision, verified):
    parity = verified(precision, lambda logits: resized(logits, SIZE).argmax(1))
    assert parity.ok and parity.top1_agreement == 1 and parity.cosine > 0.999999
    noise = verified("fp16", lambda x: resized(x, SIZE).argmax(1), lambda x: x + 2e-3 * torch.randn_like(x))
    assert noise.ok and noise.top1_agreement < 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_rejected(name, precision, verified):
    assert not verified(precision, MISTAKES[name]).ok


@pytest.mark.parametrize(
    ("precision", "change"),
    [
        ("fp32", lambda x: 1.001 * x),
        ("fp16", lambda x: 1.1 * x),
        ("fp32", lambda x: x + 1e-3 * torch.arange(7)[:, None, None]),
        ("fp16", lambda x: x.where(x > x.amin(), float("nan"))),
    ],
)
def test_wrong_logits_are_rejected_even_with_the_same_classes(precision, change, verified):
    parity = verified(precision, lambda logits: resized(logits, SIZE).argmax(1), change)
    assert any("decode_head.conv_seg is off" in text for text in parity.failures)


@pytest.mark.slow
def test_an_export_rejects_an_artifact_whose_logits_are_off(segmenter, tmp_path, monkeypatch):
    original = OnnxScanAccess.with_layer

    def spoilt(self, path, feeds):
        values = original(self, path, feeds)
        return {**values, path: values[path] + 1e-3}

    monkeypatch.setattr(OnnxScanAccess, "with_layer", spoilt)
    with pytest.raises(ParityError, match=r"decode_head\.conv_seg is off by"):
        export(segmenter, ExportPlan("onnx", imgsz=SIZE, scan="portable", batch=2, input="tensor"), tmp_path)
    assert list(tmp_path.glob("*.rejected"))


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        ("onnx", {"resize": "crop"}, "--resize crop: a label map covers the whole image"),
        ("onnx", {"max_det": 4}, "--max-det: upernet_micro is no detector, it gives segmentation"),
        ("onnx", {"head": "probs"}, "--head probs: upernet_micro gives label_map"),
        ("onnx", {"labels": ("a", "b")}, "2 labels for a head of 7 classes"),
        ("coreml", {"more_imgsz": ((64, 64),), "min_target": "iOS18"}, "several --imgsz: the outputs of segmenters"),
    ],
)
def test_impossible_plans_are_refused(target, settings, message, segmenter):
    spec = load_checkpoint(segmenter)[1]
    with pytest.raises(UsageError, match=message):
        complete(check_plan(get_target(target), ExportPlan(target, **({"imgsz": SIZE} | settings))), spec)


@pytest.mark.slow
def test_a_bundle_with_a_damaged_palette_is_refused(segmenter, bundle_of, tmp_path):
    from shutil import copytree

    from evm_deploy.errors import BundleError
    from tests.broken import change_manifest

    bundle = bundle_of(segmenter, ExportPlan("onnx", "fp16", imgsz=SIZE, batch=2))
    for palette in ([[1, 2]], [[1, 2, 300]], "red", [[1, 2, "x"]]):
        copy = copytree(bundle.path, tmp_path / "copy", dirs_exist_ok=True)
        change_manifest(copy, lambda content, value=palette: content["model"]["details"].update(palette=value))
        with pytest.raises(BundleError, match="palette"):
            load(copy)

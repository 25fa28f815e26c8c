"""Exported Mask R-CNN: against mmdet's detections in every runtime, mistakes that the verification rejects, evm-run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image, ImageChops

from evm_deploy import cli, load
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.data.masks import RunMask
from evm_deploy.demo.scenes import write_scenes
from evm_deploy.errors import UsageError
from evm_deploy.export.description import native_metadata
from evm_deploy.export.hub.regions import region_translations
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import make_test_inputs, synthetic_image
from evm_deploy.export.source import Source
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target, load_targets
from evm_deploy.export.verify import FloatRun, verify
from evm_deploy.model import regions
from evm_deploy.model.efficientvmamba.rcnn_checkpoint import KEEP_FLOAT
from evm_deploy.model.families import load_checkpoint
from evm_deploy.tasks.detection import DETECTION
from tests import detectors
from tests.test_rcnn import NAME, VALID, check_golden

SIZE = (96, 128)


@pytest.fixture(scope="session")
def mask_rcnn(tmp_path_factory):
    """A golden Mask R-CNN on disk."""
    return detectors.saved(tmp_path_factory.mktemp("rcnn"), NAME)


@pytest.fixture(scope="module")
def golden(mask_rcnn):
    """The golden network, which clips to the golden image without its padding as mmdet does, for all exports."""
    network = load_checkpoint(mask_rcnn)
    right = network.module.selection
    network.module.selection = lambda settings, size: right(settings, VALID)
    return Source(network)


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """exported(target, scan) -> path of the golden bundle, any number of images an inference."""
    made = {}

    def make(target, scan):
        if (target, scan) not in made:
            plan = ExportPlan(target, "fp32", imgsz=SIZE, batch="dynamic", input="tensor", scan=scan)
            made[target, scan] = export(golden, plan, tmp_path_factory.mktemp(f"{target}-{scan}")).path
        return made[target, scan]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("target", "scan"), [("onnx", "auto"), ("openvino", "plugin"), ("openvino", "portable")])
def test_an_artifact_gives_the_detections_and_masks_of_mmdet(target, scan, exported):
    case = detectors.case(NAME)
    images = np.concatenate([np.ascontiguousarray(case.inputs[..., ::-1]), case.inputs])
    with load(exported(target, scan)) as model:
        outputs = model.run({"tensor": images})
        alone = model.run({"tensor": images[1:]})
        if target == "onnx":
            assert all(check.ok for check in model.selftest())
    dtypes = {"boxes": "float32", "scores": "float32", "labels": "int32", "count": "int32", "masks": "float32"}
    assert {name: str(value.dtype) for name, value in outputs.items()} == dtypes
    assert outputs["masks"].shape == (2, 100, 28, 28)
    check_golden(outputs, case, image=1)
    check_golden(alone, case)


@pytest.mark.slow
def test_an_image_without_detections(exported):
    """The golden artifact with a background that always wins."""
    model = onnx.load(exported("onnx", "auto") / "model.onnx")
    (bias,) = (each for each in model.graph.initializer if each.name == "roi_head.bbox_head.fc_cls.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[-1] += 500
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"tensor": detectors.case(NAME).inputs.repeat(2, 0)}
    outputs = dict(zip([each.name for each in session.get_outputs()], session.run(None, feeds), strict=True))
    assert outputs["count"].tolist() == [0, 0] and (outputs["labels"] == -1).all()
    assert not any(outputs[name].any() for name in ("boxes", "scores", "masks"))
    assert DETECTION.decode(outputs, SimpleNamespace(labels=None, places=None, selection=SelectionSettings())) == [
        [],
        [],
    ]


@pytest.mark.slow
def test_both_selections_are_float32_in_float16_and_the_heads_are_not(golden, exported, tmp_path):
    exported("onnx", "auto")  # shares its trace
    target = get_target("onnx")
    settings = {"imgsz": SIZE, "batch": "dynamic", "input": "tensor", "scan": "auto"}
    plan = check_plan(target, ExportPlan("onnx", "fp16", **settings))
    spec = golden.network(plan).spec
    plan, preprocessing = complete(plan, spec)
    traced = golden.traced(target, plan, preprocessing, native_metadata(plan, spec, preprocessing))
    graph = onnx.shape_inference.infer_shapes(onnx.load(target.build(traced, plan, tmp_path).path)).graph
    half = onnx.TensorProto.FLOAT16
    halves = {each.name for each in graph.value_info if each.type.tensor_type.elem_type == half}
    halves |= {each.name for each in graph.initializer if each.data_type == half}
    selecting = [node for node in graph.node if node.name.startswith(("selection/", "selection."))]
    assert {node.op_type for node in selecting} >= {"RoiAlign", "NonMaxSuppression", "TopK", "Softmax"}
    for node in selecting:
        if node.op_type != "Cast":
            assert not halves & {*node.input, *node.output}, node.name
    (mask_head,) = (node for node in graph.node if node.name == "roi_head.mask_head.convs.0.conv/Conv")
    assert halves >= {*mask_head.input}


class Crops(torch.nn.Module):
    """Crops of regions of every level."""

    def forward(self, boxes, *levels):
        return regions.Atlas.of(levels, (4, 8, 16, 32)).crop(boxes, 7, finest=7)


@pytest.mark.filterwarnings("ignore:# The axis name")
@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.slow), 21])
def test_regions_of_every_level_are_cropped_alike_in_every_runtime(opset):
    rng = np.random.default_rng(0)
    corners = rng.uniform(-10, 80, (3, 40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, 1, (3, 40, 1)) * rng.uniform(1, 120, (3, 40, 2))], 2)
    boxes[:, 0], boxes[:, 1] = 0, [15, 10, np.nextafter(np.float32(15), np.float32(16)), 30]  # empty in cells
    levels = [rng.standard_normal((3, 4, 96 // stride, 128 // stride)) for stride in (4, 8, 16, 32)]
    values = [np.float32(each) for each in (boxes, *levels)]
    module, tensors = Crops().eval(), [torch.from_numpy(each) for each in values]
    names = [f"input{i}" for i in range(5)]
    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.onnx.export(
        module,
        tuple(tensors),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=names,
        dynamic_shapes={"boxes": batch, "levels": (batch,) * 4},
        custom_translation_table=region_translations(opset),
    )
    model = program.model_proto.SerializeToString()
    want = module(*tensors).numpy()
    sizes = np.sqrt(np.prod(boxes[..., 2:] - boxes[..., :2], -1)) / 7
    assert {*np.floor(np.log2(sizes[:, 1:] + 1e-6)).clip(0, 3).ravel()} == {0, 1, 2, 3}
    assert not want.reshape(3, 40, -1)[:, 0].any() and want.reshape(120, -1).any(1).sum() > 100
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(openvino.Core().read_model(model), "CPU")
    for count in (3, 1):
        feeds = dict(zip(names, [each[:count] for each in values], strict=True))
        assert np.abs(session.run(None, feeds)[0] - want[: 40 * count]).max() < 1e-5
        assert np.abs(compiled(feeds)[0] - want[: 40 * count]).max() < 1e-5


# --------------------------------------------------------------------------------- mistakes put in on purpose


class Artifact:
    """A runtime whose artifact is a selection on maps that are known."""

    def __init__(self, maps, selection):
        self.inputs = {"tensor": SimpleNamespace(dtype="float32", shape=(None, 3, *SIZE), name="tensor")}
        self._maps, self._selection = maps, selection

    def run(self, feeds):
        with torch.inference_mode():
            values = self._selection(*self._maps)
        return {name: value.numpy() for name, value in zip(self._selection.outputs, values, strict=True)}


def heads(change):
    """A mistake in the results of the box head."""

    def apply(selection, monkeypatch):
        box, mask = selection._heads
        selection._heads = (lambda crops: change(*box(crops)), mask)

    return apply


def masks(change):
    """A mistake in the logits of the mask head."""

    def apply(selection, monkeypatch):
        box, mask = selection._heads
        selection._heads = (box, lambda crops: change(mask(crops)))

    return apply


def cropped(change):
    """A mistake in RoIAlign: change(boxes) -> boxes."""

    def apply(selection, monkeypatch):
        right = regions.roi_align
        monkeypatch.setattr(regions, "roi_align", lambda maps, boxes, size: right(maps, change(boxes), size))

    return apply


def rolled(logits, deltas):
    return logits.roll(1, 1), deltas


MISTAKES = {
    "another level": lambda s, _: setattr(s, "region", replace(s.region, finest=28)),
    "RoIAlign that is not aligned": cropped(lambda boxes: boxes + 0.5),
    "background first": heads(rolled),
    "stds of the first stage": lambda s, _: s.stds.fill_(1.0),
    "dx and dy changed": heads(
        lambda logits, deltas: (logits, deltas.reshape(-1, 4)[:, [1, 0, 3, 2]].reshape(deltas.shape))
    ),
    "deltas of another class": heads(lambda logits, deltas: (logits, deltas.roll(4, 1))),
    "100 proposals": lambda s, _: setattr(s.proposals, "before", 100),
    "levels together": lambda s, _: setattr(
        s.proposals, "suppressed", lambda b, c, k: type(s).suppressed(s.proposals, b, c, k * 0)
    ),
    "another threshold": lambda s, _: setattr(s, "settings", SelectionSettings(score_thr=0.99)),
    "one class": lambda s, _: setattr(s, "suppressed", lambda b, c, k: type(s).suppressed(s, b, c, k * 0)),
    "masks of another class": masks(lambda logits: logits.roll(1, 1)),
    "masks on their side": masks(lambda logits: logits.transpose(2, 3)),
    "masks without the sigmoid": masks(lambda logits: torch.logit(logits.sigmoid().clamp(0, 1) * 0.98 + 0.01)),
}


@pytest.fixture(scope="module")
def verified(mask_rcnn):
    """verified(mistake, monkeypatch) -> Parity of an artifact with it."""
    network = load_checkpoint(mask_rcnn)
    network.module.region = replace(network.module.region, finest=14)  # regions of this small image on several levels
    plan = check_plan(get_target("onnx"), ExportPlan("onnx", imgsz=SIZE, input="tensor"))
    plan, preprocessing = complete(plan, network.spec)
    inputs = make_test_inputs(plan, preprocessing, 1)
    with torch.inference_mode():
        maps = network.module(torch.from_numpy(inputs))
    right = Artifact(maps, network.module.selection(plan.selection, SIZE)).run({})
    access = SimpleNamespace(names=(), in_situ=lambda feeds: [])

    def check(mistake, monkeypatch):
        wrong = network.module.selection(plan.selection, SIZE)
        if mistake:
            mistake(wrong, monkeypatch)
        run = FloatRun(inputs, right, [], {})
        return verify(run, Artifact(maps, wrong), access, plan, DETECTION, float16=False)

    return check


def test_the_right_selection_is_accepted(verified, monkeypatch):
    parity = verified(None, monkeypatch)
    assert parity.ok and parity.top1_agreement == 1 and parity.cosine > 0.999999


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_rejected(name, verified, monkeypatch):
    assert not verified(MISTAKES[name], monkeypatch).ok


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("target", load_targets())
def test_targets_without_roi_align_are_refused_before_any_work(target, mask_rcnn):
    plan = check_plan(get_target(target), ExportPlan(target, imgsz=SIZE))
    network = load_checkpoint(mask_rcnn)
    if target in ("onnx", "openvino"):
        assert complete(plan, network.spec)[0].nms == "graph"
        return
    with pytest.raises(
        UsageError, match=f"target '{target}' cannot run maskrcnn_micro: evm-deploy has no RoIAlign"
    ) as error:
        complete(plan, network.spec)
    assert "onnx, openvino" in error.value.hint and "--head features" in error.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nms": "none"}, "--nms none: maskrcnn_micro has two stages"),
        ({"opset": 22}, "--opset 22: ONNX Runtime"),
    ],
)
def test_impossible_plans_are_refused(settings, message, mask_rcnn):
    network = load_checkpoint(mask_rcnn)
    with pytest.raises(UsageError, match=message):
        complete(check_plan(get_target("onnx"), ExportPlan("onnx", imgsz=SIZE, **settings)), network.spec)


# ------------------------------------------------------------------------------------------------------------- int8


@pytest.mark.slow
def test_both_stages_become_int8(golden, monkeypatch, tmp_path):
    """Random weights rank nothing, so half of the detections may change; the first stage's maps are within 25 dB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_scenes(tmp_path, 100, 5000)
    calib = tmp_path / "images"
    plan = ExportPlan("onnx", "int8", imgsz=SIZE, calib=calib, smooth="off", calib_method="minmax", weight_bits=7)
    bundle = export(golden, plan, tmp_path / "out")
    facts = bundle.manifest.accuracy
    assert facts["sqnr_db"] > 25 and facts["agreement"] > 0.7 and bundle.manifest.parity["ok"]
    model = onnx.load(bundle.path / "model.onnx")
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels", "count", "masks"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    read = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    rounded = {name for name in read if types.get(name) == onnx.TensorProto.INT8}
    for layer in ("neck.fpn_convs", "rpn_head.rpn_conv", "roi_head.bbox_head.shared_fcs", "roi_head.mask_head.convs"):
        assert any(layer in name for name in rounded), layer
    assert not [name for name in rounded for layer in KEEP_FLOAT if layer in name]
    exact = {"TopK", "NonMaxSuppression", "Exp", "Sigmoid", "Softmax"}
    selecting = [n for n in model.graph.node if n.name.startswith("selection") and n.op_type in exact]
    dequantized = {name for n in model.graph.node if n.op_type == "DequantizeLinear" for name in n.output}
    assert selecting and not dequantized & {name for n in selecting for name in n.input}
    with load(bundle.path) as loaded:
        assert all(check.ok for check in loaded.selftest())


# --------------------------------------------------------------------------------------------------------- evm-run


@pytest.mark.slow
def test_evm_run_draws_masks_and_writes_run_lengths(exported, tmp_path, capsys):
    photos, bundle = tmp_path / "photos", exported("onnx", "auto")
    photos.mkdir()
    for name, (height, width) in {"a.png": (150, 200), "b.png": (1, 1)}.items():
        Image.fromarray(synthetic_image(height, width, 5)).save(photos / name)
    Image.new("RGB", (4000, 3000)).save(photos / "c.png")
    asked = [str(bundle), str(photos), "--json", "--min-score", "0.9", "--save", str(tmp_path / "drawn")]
    code = cli.run_main(asked)
    rows = json.loads(capsys.readouterr().out)
    assert code == 0 and len(rows) == 3
    for row, size in zip(rows, ((150, 200), (1, 1), (3000, 4000)), strict=True):
        for each in row["detections"]:
            mask = RunMask.from_coco(each["mask"], size).array()
            y, x = np.nonzero(mask)
            box = each["box"]
            assert not len(x) or (box["x1"] - 1 <= x.min() and x.max() <= box["x2"] and y.max() <= box["y2"])
    assert len(rows[0]["detections"]) > 1 and any(row["detections"] for row in rows[1:])
    drawn, photo = Image.open(tmp_path / "drawn" / "a.png"), Image.open(photos / "a.png")
    assert drawn.size == photo.size and ImageChops.difference(drawn, photo).getbbox()


@pytest.mark.slow
def test_predictions_of_pixels_have_masks_of_the_inputs_size(exported):
    with load(exported("onnx", "auto")) as model:
        (found,) = model.classify(synthetic_image(*SIZE, 3)[None])
    assert found and {each.mask.array().shape for each in found} == {SIZE}

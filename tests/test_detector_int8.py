"""int8 and w8 of detectors: judged by AP with labels, by the head's maps without; parts of the head fall back."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from PIL import Image

from evm_deploy import cli, load
from evm_deploy._util.kept import KeptResults
from evm_deploy.calib import evaluation
from evm_deploy.calib.evaluation import Evaluation
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.probe import is_probe, maps_read, with_probes, without_probes
from evm_deploy.calib.table import CalibrationTable
from evm_deploy.data.images import ImageSet
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.data.sources import ImageItem
from evm_deploy.demo import CHECKPOINTS
from evm_deploy.demo.scenes import write_scenes
from evm_deploy.errors import AccuracyError
from evm_deploy.export.hub.graph import trace
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.source import Source
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.model.efficientvmamba.detector import KEEP_FLOAT
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.tasks.average_precision import Objects
from evm_deploy.tasks.detection import DETECTION
from evm_deploy.tasks.task import Reading
from tests import detectors

SIZE = (96, 128)
CLASSES = ["disc", "square"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """No result of another module or run is found; a calibration serves the tests of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """A golden RetinaNet on disk."""
    return detectors.saved(tmp_path_factory.mktemp("detector"))


def coco(folder, images, classes, changes=None):
    """Write a COCO file. images: (pixels, boxes, labels) of each."""
    (folder / "val").mkdir(parents=True)
    listed, annotations = [], []
    for i, (pixels, boxes, labels) in enumerate(images):
        Image.fromarray(pixels).save(folder / "val" / f"{i}.png")
        listed.append({"id": i, "file_name": f"{i}.png"})
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({"image_id": i, "category_id": label, "bbox": box, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    content = {"images": listed, "annotations": annotations, "categories": categories, **(changes or {})}
    (folder / "val.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "val.json"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """(checkpoint, calibration images, COCO file) of the trained detector."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "calib", 100, 5000)
    write_scenes(folder, 60)
    return CHECKPOINTS["detector"], folder / "calib" / "images", folder / "instances.json"


def plan_of(scenes, **settings):
    _, calib, val = scenes
    return ExportPlan("onnx", "int8", imgsz=128, calib=calib, val=val, smooth="off", calib_method="minmax", **settings)


def spoil(monkeypatch, *modules, by):
    """Divide the ranges of the activations of these modules."""
    original = CalibrationTable.ranges

    def spoilt(self, method):
        found = original(self, method)
        return {
            key: Range(each.low / by, each.high / by) if key.startswith(modules) else each
            for key, each in found.items()
        }

    monkeypatch.setattr(CalibrationTable, "ranges", spoilt)


@pytest.mark.slow
def test_the_trained_detector_keeps_its_average_precision(scenes, tmp_path):
    bundle = export(scenes[0], plan_of(scenes), tmp_path)
    facts = bundle.manifest.accuracy
    assert facts["metric"] == "AP" and facts["images"] == 60 and facts["ok"]
    assert abs(facts["drop"]) < 1 and facts["sqnr_db"] > 25 and 0.8 < facts["agreement"] <= 1
    assert 0.7 < facts["AP_float"] < facts["AP75_float"] < facts["AP50_float"] < 1
    model = onnx.load(bundle.path / "model.onnx")
    assert not any(is_probe(value.name) for value in model.graph.output)
    with load(bundle.path) as loaded:
        assert all(check.ok for check in loaded.selftest())
    left = [node for node in model.graph.node if node.name.startswith(KEEP_FLOAT) and node.op_type == "Conv"]
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert len(left) == 11 and {weights[node.input[1]] for node in left} == {onnx.TensorProto.FLOAT}
    selection = [node for node in model.graph.node if node.name.startswith("selection/")]
    assert selection and not {"QuantizeLinear"} & {node.op_type for node in selection}


@pytest.mark.slow
def test_a_spoilt_part_of_the_head_stays_in_float(monkeypatch, scenes, tmp_path):
    spoil(monkeypatch, "bbox_head.reg_convs", by=8)
    facts = export(scenes[0], plan_of(scenes), tmp_path).manifest
    quantization = facts.details["quantization"]
    assert quantization["in_float"] == ["bbox_head.reg_convs"] and facts.accuracy["drop"] < 1
    measured = quantization["sensitivity_sqnr_db"]
    assert min(measured, key=measured.get) == "bbox_head.reg_convs"
    assert {"neck.fpn_convs", "neck.lateral_convs", "bbox_head.cls_convs"} < set(measured)
    assert any(block.startswith("backbone.layers") for block in measured)


@pytest.mark.slow
def test_the_gate_refuses_a_detector_that_finds_less(monkeypatch, scenes, tmp_path):
    """No block that falls back can mend it: the limit is below the noise of the layers that are left."""
    monkeypatch.setattr(
        "evm_deploy.calib.int8.keep_float_until", lambda evaluate, more, kept, accuracy: (kept, accuracy)
    )
    spoil(monkeypatch, "bbox_head.reg_convs", by=8)
    with pytest.raises(AccuracyError, match=r"int8 is not accurate enough \(limit 1 points\): AP .* float \(-"):
        export(scenes[0], plan_of(scenes), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".rejected"]


# --------------------------------------------------------------------------------------------- noise without labels


@pytest.fixture(scope="module")
def graph(detector):
    """(hub graph, preprocessing) of a golden detector."""
    plan = check_plan(get_target("onnx"), ExportPlan("onnx", imgsz=SIZE))
    source = Source(detector)
    plan, preprocessing = complete(plan, source.network(plan).spec)
    return trace(source.reference(plan, preprocessing), plan, {}).model


@pytest.mark.slow
def test_probes_show_the_maps_of_each_part_of_the_head(graph):
    found = maps_read(graph)
    assert {module: len(maps) for module, maps in found.items()} == {
        "bbox_head.retina_cls": 5,
        "bbox_head.retina_reg": 5,
    }
    before = graph.SerializeToString(deterministic=True)
    probed = with_probes(graph)
    onnx.checker.check_model(probed, full_check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    with OnnxRuntime(probed.SerializeToString()) as runtime:
        outputs = runtime.run({"image": pixels})
    assert (
        outputs["probe1"].shape == (1, 2 * 1024 + 432 + 144 + 36)
        and outputs["probe0"].shape[1] == 2 * 1024 + 540 + 180 + 45
    )
    assert graph.SerializeToString(deterministic=True) == before
    assert without_probes(probed).SerializeToString(deterministic=True) == before


@pytest.mark.slow
def test_without_labels_the_maps_are_judged(monkeypatch, detector, images, tmp_path, capsys):
    flags = ["--target", "onnx", "--int8", "--imgsz", "96x128", "--calib", str(images), "-o", str(tmp_path), "-q"]
    flags += ["--smooth", "off", "--calib-method", "minmax"]
    spoil(monkeypatch, "bbox_head.reg_convs.1", by=3)  # no score shows it: the detections stay many and confident
    assert cli.export_main([str(detector), *flags]) == 5
    assert "int8 is not accurate enough (at least 20 dB): same answers" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ labelled images


@pytest.mark.parametrize(
    ("classes", "changes", "message"),
    [
        (
            ["person", "自転車", "λεωφορείο", "cat", "🦆"],
            {},
            "1 of 5 categories are not among the network's classes: cat",
        ),
        (detectors.CLASSES, {"images": [{"id": 0, "file_name": "absent.png"}]}, "the image 'absent.png' is not found"),
        (detectors.CLASSES, {"annotations": []}, "no image has an object to find"),
    ],
)
def test_labelled_data_that_does_not_fit(classes, changes, message, tmp_path, capsys):
    state = detectors.tensors(detectors.case("retina_micro"))
    path = detectors.save(tmp_path / "d.pth", state, {"dataset_meta": {"classes": detectors.CLASSES}})
    shown = [(np.zeros((30, 40, 3), np.uint8), np.array([[1, 2, 10, 20.0]]), np.array([1]))]
    val = coco(tmp_path / "data", shown, classes, changes)
    flags = ["--target", "onnx", "--precision", "w8", "--imgsz", "96x128", "--val", str(val), "--dry-run"]
    assert cli.export_main([str(path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert cli.export_main([str(path), *flags[:-2], str(tmp_path / "data" / "val"), "--dry-run"]) == 2
    assert "no VOC annotations" in capsys.readouterr().err
    good = coco(tmp_path / "good", shown, detectors.CLASSES)
    assert cli.export_main([str(path), *flags[:-2], str(good), "--dry-run"]) == 0
    assert f"1 images of {good}" in capsys.readouterr().out


class Interrupted:
    """Evaluation of a detector that finds the object of image i, in int8 only where i is no multiple of 5."""

    def __init__(self, folder, dies=None):
        self.seen, self.dies = 0, dies
        self.config = SimpleNamespace(
            val="val", input="image", task=DETECTION, max_drop=1.0, reading=Reading(), kept=KeptResults(folder)
        )

    def outputs(self, pixels, lost):
        i = int(pixels[0, 0, 0])
        box = [2 + i % 7, 2, 20, 20] if not lost else [40, 40, 60, 60]
        found = {"boxes": [[box]], "scores": [[0.5 + (i % 4) / 10]], "labels": [[0]], "count": [1]}
        dtypes = {"boxes": np.float32, "scores": np.float32}
        return {name: np.array(value, dtypes.get(name, np.int32)) for name, value in found.items()}

    @contextmanager
    def open(self, model):
        def run(feeds):
            self.seen += 1
            if self.seen == self.dies:
                raise KeyboardInterrupt
            pixels = feeds["image"][0]
            return self.outputs(pixels, int(pixels[0, 0, 0]) % 5 == 0)

        yield SimpleNamespace(inputs={"image": SimpleNamespace(shape=(1,))}, run=run)

    def result(self):
        items = []
        for i in range(50):
            pixels = np.full((64, 64, 3), i, np.uint8)
            truth = replace(Objects.of(np.array([[4.0, 4, 40, 40]]), np.array([0])), number=i)
            items.append(ImageItem(str(i), pixels, truth, decoded=pixels, size=(128, 128)))
        images = ImageSet(tuple(items), Preprocessing((64, 64), resize="pad"))
        candidate = SimpleNamespace(quantized=lambda blocks: None, identity=lambda blocks: "candidate")
        return Evaluation(images, self.floats, self.config, self.open)(candidate, ["a"])

    def floats(self, images):
        for pixels in images.pixels():
            yield self.outputs(pixels, False)


def test_an_interrupted_evaluation_continues(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "SHARD", 8)
    alone = Interrupted(None)
    expected = alone.result()
    assert alone.seen == 50 and 0 < expected.scores["AP"] < expected.float_scores["AP"] < 1
    assert expected.sqnr_db is None and expected.agreement == pytest.approx(0.8)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tmp_path, dies=30).result()
    again = Interrupted(tmp_path)
    assert again.result() == expected and again.seen == 50 - 24

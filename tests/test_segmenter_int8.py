"""int8 and w8 of segmenters: judged by mIoU with masks, by the logits without; label maps stay what they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from PIL import Image

from evm_deploy import load
from evm_deploy.demo import CHECKPOINTS
from evm_deploy.demo.scenes import write_scenes
from evm_deploy.errors import CalibrationError
from evm_deploy.export import ExportPlan, export
from evm_deploy.export.source import Source

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """No result of another module or run is found; a calibration serves the tests of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Folder of labelled scenes, and images to calibrate with in `calib`."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "calib", 100, 5000)
    write_scenes(folder, 40)
    return folder


@pytest.fixture(scope="module")
def source():
    """The trained segmenter, traced once."""
    return Source(CHECKPOINTS["segmenter"])


def plan_of(scenes, **settings):
    calib = scenes / "calib" / "images"
    return ExportPlan("onnx", "int8", calib=calib, smooth="off", calib_method="minmax", **settings)


def test_the_trained_segmenter_keeps_its_mean_iou(scenes, source, tmp_path):
    """In ONNX; benchmarks/detectors.py has OpenVINO too, on 500 scenes."""
    bundle = export(source, plan_of(scenes, val=scenes, max_drop=0.5), tmp_path)
    facts = bundle.manifest.accuracy
    assert facts["metric"] == "mIoU" and facts["images"] == 40 and facts["ok"] and abs(facts["drop"]) < 0.5
    assert 0.8 < facts["mIoU_float"] < facts["pixel_accuracy_float"] < 1
    assert facts["sqnr_db"] > 25 and 0.97 < facts["agreement"] < 1
    with load(bundle.path) as model:
        assert list(model.outputs) == ["label_map"]  # nothing that was measured on the way
        assert all(check.ok for check in model.selftest())


def test_without_masks_the_logits_are_compared(scenes, source, tmp_path):
    bundle = export(source, plan_of(scenes), tmp_path)
    facts = bundle.manifest.accuracy
    assert facts["sqnr_db"] > 25 and "mIoU" not in facts
    model = onnx.load(bundle.path / "model.onnx")
    assert [value.name for value in model.graph.output] == ["label_map"]
    selection = [node for node in model.graph.node if node.name.startswith("selection/")]
    assert selection and not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in selection}


def test_masks_that_do_not_fit_are_told_before_the_work(scenes, source, tmp_path):
    write_scenes(tmp_path, 3)
    mask = tmp_path / "annotations" / "0001.png"
    Image.fromarray(np.full((128, 128), 40, np.uint8)).save(mask)
    with pytest.raises(CalibrationError, match=r"0001\.png has the classes 40, the network has 0 to 8"):
        export(source, ExportPlan("onnx", "w8", val=tmp_path), tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"instances\.json is not a folder"):
        export(source, ExportPlan("onnx", "w8", val=scenes / "instances.json"), tmp_path / "out")

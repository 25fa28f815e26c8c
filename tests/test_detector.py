"""RetinaNet checkpoints of mmdet: against mmdet's own outputs, and files that are read, completed or refused."""

from __future__ import annotations

import os
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch

from evm_deploy.commands.convert import main as convert_main
from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.errors import CheckpointError
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.openmmlab import TrainingSettings, parse_config
from evm_deploy.tasks import detection
from tests import detectors

NAMES = ("boxes", "scores", "labels", "count")


def outputs(model, images, size, **settings):
    selection = model.selection(SelectionSettings(**settings), size)
    with torch.inference_mode():
        values = selection(*model(torch.from_numpy(images)))
    return {name: value.numpy() for name, value in zip(NAMES, values, strict=False)}


@pytest.mark.parametrize("name", detectors.CASES)
def test_detections_are_those_of_mmdet(name, tmp_path):
    case = detectors.case(name)
    model, spec = load_checkpoint(detectors.saved(tmp_path, name))
    unused = model.backbone.arch.dim * 2 if "backbone.outnorm0.weight" in case.state else 0
    assert spec.parameters == case.facts["params"] - unused
    with torch.inference_mode():
        maps = model(torch.from_numpy(case.inputs))
    for i, got in enumerate(maps):
        key = f"{'cls' if i < 5 else 'reg'}{i % 5}"
        assert np.abs(got.numpy().reshape(-1)[:64] - case.expected[f"{key}/head"]).max() < 1e-4
        stats = np.array([got.mean(), got.std(correction=0), got.abs().max()])
        np.testing.assert_allclose(stats, case.expected[f"{key}/stats"], atol=1e-4, rtol=1e-4)
    candidates = outputs(model, case.inputs, case.inputs.shape[2:], nms="none")
    found = detection.select(candidates, SelectionSettings(), detectors.places(case))
    for j, each in enumerate(found):
        assert each.labels.tolist() == case.expected[f"image{j}/labels"].tolist()
        assert np.abs(each.scores - case.expected[f"image{j}/scores"]).max() < 1e-4
        assert np.abs(each.boxes - case.expected[f"image{j}/boxes"]).max() < 0.01


def test_nms_in_the_graph_selects_the_same_where_nothing_is_padded(tmp_path):
    case = detectors.case("retina_tiny_odd_200x232")
    model, _ = load_checkpoint(detectors.saved(tmp_path, "retina_tiny_odd_200x232"))
    got = outputs(model, case.inputs, (200, 232))
    assert got["count"].tolist() == [100]
    assert got["labels"][0].tolist() == case.expected["image0/labels"].tolist()
    assert np.abs(got["boxes"][0] - case.expected["image0/boxes"]).max() < 0.01
    assert np.abs(got["scores"][0] - case.expected["image0/scores"]).max() < 1e-4


def test_rows_beyond_the_count_hold_nothing(tmp_path):
    case = detectors.case("retina_micro")
    model, _ = load_checkpoint(detectors.saved(tmp_path))
    got = outputs(model, case.inputs, (96, 128), score_thr=0.9, max_det=50)
    assert got["boxes"].shape == (2, 50, 4)
    for boxes, scores, labels, count in zip(*(got[name] for name in NAMES), strict=True):
        assert 0 < count < 50
        assert (scores[:count] > 0.9).all() and (np.diff(scores[:count]) <= 0).all() and (labels[:count] >= 0).all()
        assert not scores[count:].any() and not boxes[count:].any() and (labels[count:] == -1).all()
    nothing = outputs(model, case.inputs, (96, 128), score_thr=0.9999)
    assert nothing["count"].tolist() == [0, 0]
    assert (nothing["labels"] == -1).all()


@pytest.mark.parametrize("size", [(64, 64), (4, 4), (100, 36), (33, 250)])
def test_any_size_runs(size, tmp_path):
    model, _ = load_checkpoint(detectors.saved(tmp_path))
    got = outputs(model, np.zeros((3, 3, *size), np.float32), size)
    assert got["boxes"].shape == (3, 100, 4)
    for boxes, count in zip(got["boxes"], got["count"], strict=True):
        assert (boxes[:count, 2:] > boxes[:count, :2]).all()
        assert (boxes >= 0).all() and (boxes <= [size[1], size[0]] * 2).all()


def test_what_the_configuration_says_is_used_and_named(tmp_path):
    state = detectors.tensors(detectors.case("retina_micro"))
    text = detectors.CONFIG.replace("score_thr=0.05", "score_thr=0.2").replace("iou_threshold=0.5", "iou_threshold=0.6")
    meta = {"cfg": text, "dataset_meta": {"classes": detectors.CLASSES}}
    _, spec = load_checkpoint(detectors.save(tmp_path / "a.pth", state, meta))
    assert spec.task == "detection" and spec.num_classes == 5
    assert spec.defaults["labels"] == list(detectors.CLASSES)
    assert [spec.defaults[key] for key in ("score_thr", "iou", "max_det")] == [0.2, 0.6, 100]
    assert np.allclose(spec.defaults["mean"], [0.485, 0.456, 0.406])
    preprocessing = {key: spec.defaults[key] for key in ("imgsz", "resize", "interpolation")}
    assert preprocessing == {"imgsz": "800x1344", "resize": "pad", "interpolation": "bilinear-opencv"}
    found = spec.details["detector"]
    assert found["score_thr"] == {"value": 0.2, "from": "meta.cfg model.test_cfg.score_thr"}
    assert found["anchors"]["from"] == "meta.cfg model.bbox_head.anchor_generator"
    assert found["extra_levels"] == {"value": "on_input", "from": "meta.cfg model.neck.add_extra_convs"}
    plain = load_checkpoint(detectors.save(tmp_path / "b.pth", state))[1]
    assert plain.details["detector"]["score_thr"] == {"value": 0.05, "from": "default"}
    assert plain.details["detector"]["extra_levels"] == {"value": "on_input", "from": "shapes"}
    assert "labels" not in plain.defaults


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("a", "b", "c", "d", "e"), "PALETTE": None},
        {"dataset_meta": {"CLASSES": ["a", "b", "c", "d", "e"]}},
        {"dataset_meta": {"classes": ("a", "b", "c", "d", "e")}, "CLASSES": ("x",)},
    ],
)
def test_class_names_of_both_generations(meta):
    assert TrainingSettings.read(meta).classes == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    "meta", [None, 3, {"cfg": 5, "CLASSES": 7}, {"dataset_meta": {"classes": (1, 2)}}, {"cfg": "("}]
)
def test_odd_settings_are_none(meta):
    assert TrainingSettings.read(meta) == TrainingSettings()


def test_a_configuration_is_parsed_and_never_run(tmp_path):
    trap = tmp_path / "ran"
    text = f"""
import os
os.mkdir({str(trap)!r})
a = os.mkdir({str(trap)!r})
b = dict(c=-1.5, d=[1, 2, (3,)], e=os.mkdir({str(trap)!r}), **{{}}, f={{'g': None, 2: True}}, h=dict(1, i=2))
c = [x for x in ()]
b2 = b
"""
    assert parse_config(text) == {"b": {"c": -1.5, "d": [1, 2, (3,)], "f": {"g": None, 2: True}}}
    assert not trap.exists()
    assert parse_config("a = " + "[" * 3000) == {}
    assert parse_config("a = " + "-" * 5000 + "1") == {}
    assert parse_config("a = " + "dict(a=" * 70 + "1" + ")" * 70)["a"]["a"]


@pytest.fixture
def mmengine(monkeypatch):
    """A class like mmengine's HistoryBuffer: arrays, and statistics that are methods of the class."""

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])
            self.last = np.float64(0.25)
            self._statistics_methods = {"mean": type(self).mean}

        def mean(self):
            raise AssertionError("the code of a checkpoint was run")

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    for each, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.mean, "HistoryBuffer.mean")):
        each.__module__, each.__qualname__ = module.__name__, name
    return HistoryBuffer


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_loads_without_its_logs(zipped, mmengine, tmp_path):
    state = detectors.tensors(detectors.case("retina_micro"))
    raw = {f"module.{key}": value + 1 if value.is_floating_point() else value for key, value in state.items()}
    content = {
        "meta": {"cfg": detectors.CONFIG, "dataset_meta": {"classes": detectors.CLASSES}, "mmengine_version": "0.10.4"},
        "state_dict": OrderedDict(state),
        "message_hub": {"log_scalars": {"train/loss": mmengine()}, "runtime_info": {"epoch": 3}, "resumed_keys": {}},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "ema_state_dict": {**raw, "steps": torch.tensor(9)},
    }
    torch.save(content, tmp_path / "epoch_12.pth", _use_new_zipfile_serialization=zipped)
    model, spec = load_checkpoint(tmp_path / "epoch_12.pth")
    assert spec.checkpoint["weights"] == "ema" and spec.defaults["labels"] == list(detectors.CLASSES)
    assert torch.equal(model.bbox_head.retina_cls.weight, state["bbox_head.retina_cls.weight"])
    raw_model, _ = load_checkpoint(tmp_path / "epoch_12.pth", weights="raw")
    assert torch.equal(raw_model.bbox_head.retina_cls.weight, state["bbox_head.retina_cls.weight"] + 1)


def test_logs_open_no_door_for_other_code(mmengine, tmp_path):
    class Dies:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": mmengine(), "b": Dies()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="needs code to load"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_arrays_of_numpy_alone_are_refused_as_ever(tmp_path):
    torch.save({"patch_embed.0.weight": np.zeros((16, 3, 4, 4))}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="needs code to load"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_converted_file_keeps_names_and_settings(tmp_path):
    state = detectors.tensors(detectors.case("retina_micro"))
    meta = {"cfg": detectors.CONFIG, "dataset_meta": {"classes": detectors.CLASSES}}
    path = detectors.save(tmp_path / "a.pth", state, meta)
    assert convert_main([str(path), "-q"]) == 0
    before, after = (load_checkpoint(tmp_path / name)[1] for name in ("a.pth", "a.safetensors"))
    assert after.defaults == before.defaults
    assert after.details == before.details


def test_feature_maps_of_the_stages_that_the_file_normalises(tmp_path):
    case = detectors.case("retina_micro_picture")
    model, spec = load_checkpoint(detectors.saved(tmp_path, "retina_micro_picture"), head="features")
    assert spec.task == "features" and spec.outputs == ("feature1", "feature2", "feature3")
    assert "bbox_head.retina_cls.weight" in spec.checkpoint["dropped"]
    with torch.inference_mode():
        maps = model(torch.from_numpy(case.inputs))
    stages = [int(key[7]) for key in case.expected if key.startswith("feature") and key.endswith("/head")]
    for stage, got in zip(sorted(stages)[-3:], maps, strict=True):
        assert np.abs(got.numpy().reshape(-1)[:64] - case.expected[f"feature{stage}/head"]).max() < 1e-4


NECK = "neck.fpn_convs.3.conv.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox_head.retina_reg.weight": None}, "bbox_head.retina_reg.weight is missing"),
        ({"bbox_head.retina_cls.bias": None}, "1 missing: bbox_head.retina_cls.bias"),
        ({"bbox_head.retina_cls.weight": torch.zeros(44, 32, 3, 3)}, "fit no number of anchors"),
        ({"bbox_head.retina_cls.weight": torch.zeros(45)}, r"is \[45\]"),
        ({"neck.lateral_convs.0.gn.weight": torch.ones(32)}, "1 unexpected: neck.lateral_convs.0.gn.weight"),
        ({"bbox_head.cls_convs.1.conv.weight": None}, "3 unexpected: bbox_head.cls_convs.1.conv.bias"),
        ({NECK: torch.zeros(32, 77, 3, 3)}, "extra levels of the pyramid read 77 channels"),
        ({"neck.lateral_convs.1.conv.weight": torch.zeros(32, 77, 1, 1)}, "the pyramid reads maps of"),
        ({"backbone.outnorm2.weight": None}, "1 missing: backbone.outnorm2.weight"),
        ({"backbone.patch_embed.0.weight": None}, "backbone is not EfficientVMamba"),
        ({"backbone.layers.0.blocks.0.norm.bias": torch.full((16,), np.nan)}, "holds NaN"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(detectors.saved(tmp_path, **changes))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type='nms'", "type='soft_nms'", "NMS of type 'soft_nms'"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "images in the order BGR"),
        ("use_sigmoid=True", "use_sigmoid=False", "a softmax over classes"),
        ("scales_per_octave=3", "scales_per_octave=2", "9 anchors a position; its configuration describes 2 scales"),
    ],
)
def test_settings_that_would_give_other_detections_are_refused(old, new, message, tmp_path):
    state = detectors.tensors(detectors.case("retina_micro"))
    assert old in detectors.CONFIG
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(detectors.save(tmp_path / "a.pth", state, {"cfg": detectors.CONFIG.replace(old, new)}))


def test_a_detector_has_no_logits(tmp_path):
    with pytest.raises(CheckpointError, match="has no head 'logits'"):
        load_checkpoint(detectors.saved(tmp_path), head="logits")


def test_extra_levels_may_read_the_output_before_them(tmp_path):
    case = detectors.case("retina_micro")
    wide = {NECK: torch.from_numpy(case.state["neck.fpn_convs.4.conv.weight"])}
    model, spec = load_checkpoint(detectors.saved(tmp_path, **wide))
    assert spec.details["detector"]["extra_levels"] == {"value": "on_output", "from": "default"}
    images = torch.from_numpy(case.inputs)
    with torch.inference_mode():
        levels = model.neck(model.backbone(images))
        conv = model.neck.fpn_convs[3].conv
        again = torch.nn.functional.conv2d(levels[2], conv.weight, conv.bias, 2, 1)
    assert torch.equal(levels[3], again)


def test_a_pyramid_without_extra_convolutions_pools(tmp_path):
    state = detectors.tensors(detectors.case("retina_micro"))
    state = {key: value for key, value in state.items() if not key.startswith(("neck.fpn_convs.3", "neck.fpn_convs.4"))}
    text = detectors.CONFIG.replace("add_extra_convs='on_input'", "add_extra_convs=False")
    model, _ = load_checkpoint(detectors.save(tmp_path / "a.pth", state, {"cfg": text}))
    with torch.inference_mode():
        levels = model.neck(model.backbone(torch.rand(1, 3, 96, 128)))
    assert len(levels) == 5
    assert torch.equal(levels[3], levels[2][:, :, ::2, ::2])

"""Faster and Mask R-CNN checkpoints of mmdet: against mmdet's own outputs, and files that are completed or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.errors import CheckpointError
from evm_deploy.model.families import load_checkpoint
from evm_deploy.model.regions import Atlas, roi_align
from evm_deploy.tasks import detection
from evm_deploy.tasks.task import Reading
from tests import detectors

NAME = "maskrcnn_micro"
VALID = (90, 125)  # size of the golden image without its padding: mmdet clips proposals and boxes to it
CONFIG = """
model = dict(
    data_preprocessor=dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    neck=dict(num_outs=5, type='FPN'),
    roi_head=dict(
        bbox_head=dict(
            bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(use_sigmoid=False), reg_class_agnostic=False),
        bbox_roi_extractor=dict(featmap_strides=[4, 8, 16, 32], finest_scale=56,
            roi_layer=dict(output_size=7, sampling_ratio=0, type='RoIAlign')),
        mask_roi_extractor=dict(featmap_strides=[4, 8, 16, 32],
            roi_layer=dict(output_size=14, sampling_ratio=0, type='RoIAlign'))),
    rpn_head=dict(
        anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales=[8], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(use_sigmoid=True)),
    test_cfg=dict(
        rcnn=dict(mask_thr_binary=0.5, max_per_img=100, nms=dict(iou_threshold=0.5, type='nms'), score_thr=0.05),
        rpn=dict(max_per_img=1000, min_bbox_size=0, nms=dict(iou_threshold=0.7, type='nms'), nms_pre=1000)))
test_pipeline = [dict(keep_ratio=True, scale=(1333, 800), type='Resize')]
"""


@pytest.fixture(scope="module")
def case():
    return detectors.case(NAME)


@pytest.fixture(scope="module")
def golden(case, tmp_path_factory):
    """The golden Mask R-CNN, its spec, and its dense maps."""
    network = load_checkpoint(detectors.saved(tmp_path_factory.mktemp("rcnn"), NAME))
    with torch.inference_mode():
        maps = network.module(torch.from_numpy(case.inputs))
    return *network, maps


def run(selection, maps):
    with torch.inference_mode():
        values = selection(*maps)
    return {name: value.numpy() for name, value in zip(selection.outputs, values, strict=True)}


def golden_masks(case):
    height, width = case.metas[0]["ori_shape"]
    return np.unpackbits(case.expected["image0/masks"], axis=-1)[:, :height, :width].astype(bool)


def check_golden(outputs, case, image=0):
    """Compare the detections of an image with mmdet's: labels in order, scores, boxes, masks pixel by pixel."""
    one = {name: value[image : image + 1] for name, value in outputs.items()}
    (found,) = detection.decode(one, Reading(places=detectors.places(case)))
    assert [each.index for each in found] == case.expected["image0/labels"].tolist()
    assert np.abs(np.array([each.score for each in found]) - case.expected["image0/scores"]).max() < 1e-4
    assert np.abs(np.array([each.box for each in found]) - case.expected["image0/boxes"]).max() < 0.05
    masks = golden_masks(case)
    assert all(np.array_equal(each.mask.array(), want) for each, want in zip(found, masks, strict=False))
    assert masks.any((1, 2)).sum() > 15


def test_every_step_is_that_of_mmdet(case, golden):
    model, spec, maps = golden
    assert spec.parameters == case.facts["params"] and spec.family == "EfficientVMamba Mask R-CNN"
    assert (spec.task, spec.num_classes, spec.regions) == ("detection", 5, True)
    for i, got in enumerate(maps[:10]):
        key = f"rpn_{'cls' if i < 5 else 'reg'}{i % 5}"
        assert np.abs(got.numpy().reshape(-1)[:64] - case.expected[f"{key}/head"]).max() < 1e-4
        stats = np.array([got.mean(), got.std(correction=0), got.abs().max()])
        np.testing.assert_allclose(stats, case.expected[f"{key}/stats"], atol=1e-4, rtol=1e-4)
    selection = model.selection(SelectionSettings(), VALID)
    with torch.inference_mode():
        proposals, scores, _, count = selection.proposals(*maps[:10])
        crops = Atlas.of(maps[10:], (4, 8, 16, 32)).crop(proposals, 7, 56)
    assert count.tolist() == [1000]
    assert np.abs(proposals[0].numpy() - case.expected["image0/proposals"]).max() < 0.01
    assert np.abs(scores[0].numpy() - case.expected["image0/proposal_scores"]).max() < 1e-4
    stats = np.array([crops.mean(), crops.std(correction=0), crops.abs().max()])
    np.testing.assert_allclose(stats, case.expected["roi_features/stats"], atol=1e-4, rtol=1e-4)
    outputs = run(selection, maps)
    check_golden(outputs, case)
    probabilities = 1 / (1 + np.exp(-case.expected["image0/mask_logits"]))
    assert np.abs(outputs["masks"][0, :20] - probabilities).max() < 1e-4


def test_a_file_without_a_mask_head_is_a_faster_rcnn(case, golden, tmp_path):
    without = {key: None for key in case.state if "mask_head" in key}
    model, spec = load_checkpoint(detectors.saved(tmp_path, NAME, **without))
    assert spec.family == "EfficientVMamba Faster R-CNN"
    assert not any("mask" in path for path in (*spec.blocks, *spec.keep_float))
    assert all(model.get_submodule(path) for path in (*spec.blocks, *spec.keep_float))
    outputs = run(model.selection(SelectionSettings(), VALID), golden[2])
    assert [*outputs] == ["boxes", "scores", "labels", "count"]
    assert outputs["labels"][0].tolist() == case.expected["image0/labels"].tolist()
    (found,) = detection.decode(outputs, Reading(places=detectors.places(case)))
    assert all(each.mask is None for each in found)


def test_blocks_and_layers_in_float_exist(golden):
    model, spec, _ = golden
    assert all(model.get_submodule(path) for path in (*spec.blocks, *spec.keep_float))


def test_images_of_a_batch_do_not_mix(golden, case):
    model, _, _ = golden
    images = np.concatenate([np.ascontiguousarray(case.inputs[..., ::-1]), case.inputs])
    with torch.inference_mode():
        maps = model(torch.from_numpy(images))
    check_golden(run(model.selection(SelectionSettings(), VALID), maps), case, image=1)


def test_no_detections_and_few(golden):
    model, _, maps = golden
    nothing = run(model.selection(SelectionSettings(score_thr=1 - 1e-12), VALID), maps)
    assert nothing["count"].tolist() == [0]
    assert (nothing["labels"] == -1).all() and not nothing["masks"].any() and not nothing["boxes"].any()
    few = run(model.selection(SelectionSettings(score_thr=0.5, max_det=7), VALID), maps)
    assert few["masks"].shape == (1, 7, 28, 28) and 0 < few["count"][0] <= 7


@pytest.mark.parametrize("size", [(4, 4), (33, 70)])
def test_any_size_runs(size, golden):
    model, _, _ = golden
    with torch.inference_mode():
        maps = model(torch.zeros(1, 3, *size))
    found = run(model.selection(SelectionSettings(max_det=5), size), maps)
    count = found["count"][0]
    boxes = found["boxes"][0, :count]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes <= [size[1], size[0]] * 2).all()
    assert np.isfinite(found["masks"]).all()


def test_one_box_and_one_mask_for_all_classes(case, golden, tmp_path):
    """Class-agnostic heads: the deltas and the map of class 2, for every class."""
    changes = {}
    for name, head in (("fc_reg", "bbox_head"), ("conv_logits", "mask_head")):
        for kind in ("weight", "bias"):
            key = f"roi_head.{head}.{name}.{kind}"
            rows = slice(8, 12) if name == "fc_reg" else slice(2, 3)
            changes[key] = torch.from_numpy(case.state[key][rows])
    model, _ = load_checkpoint(detectors.saved(tmp_path, NAME, **changes))
    outputs = run(model.selection(SelectionSettings(), VALID), golden[2])
    assert outputs["count"].tolist() == [100] and outputs["masks"].any()
    full = golden[0].selection(SelectionSettings(), VALID)
    head = full._heads[0]
    full._heads = (lambda crops: (head(crops)[0], head(crops)[1][:, 8:12].repeat(1, 5)), full._heads[1])
    assert np.allclose(run(full, golden[2])["boxes"], outputs["boxes"], atol=1e-4)


def test_what_the_configuration_says_is_used_and_named(case, tmp_path):
    state = detectors.tensors(case)
    text = CONFIG.replace("iou_threshold=0.7", "iou_threshold=0.6").replace("score_thr=0.05", "score_thr=0.2")
    text = text.replace("max_per_img=1000", "max_per_img=300").replace("finest_scale=56", "finest_scale=28")
    text = text.replace("mask_roi_extractor=dict(", "mask_roi_extractor=dict(finest_scale=28, ")
    model, spec = load_checkpoint(detectors.save(tmp_path / "a.pth", state, {"cfg": text, "CLASSES": tuple("abcde")}))
    assert model.region.proposals == SelectionSettings(0.0, 0.6, 300) and model.region.finest == 28
    assert spec.defaults["score_thr"] == 0.2 and spec.defaults["labels"] == list("abcde")
    assert spec.defaults["imgsz"] == "800x1344"
    found = spec.details["detector"]
    assert found["proposals"] == {"value": 300, "from": "meta.cfg model.test_cfg.rpn.max_per_img"}
    assert found["stds"]["from"] == "meta.cfg model.roi_head.bbox_head.bbox_coder.target_stds"
    assert found["anchors"]["from"] == "meta.cfg model.rpn_head.anchor_generator"
    plain = load_checkpoint(detectors.save(tmp_path / "b.pth", state))[1]
    assert plain.details["detector"]["proposals"] == {"value": 1000, "from": "default"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("iou_threshold=0.5, type='nms'", "iou_threshold=0.5, type='soft_nms'", "NMS of type 'soft_nms' in rcnn"),
        ("iou_threshold=0.7, type='nms'", "type='nms', class_agnostic=True", "without regard to classes in rpn"),
        ("bgr_to_rgb=True", "bgr_to_rgb=False", "images in the order BGR"),
        ("use_sigmoid=False", "use_sigmoid=True", "a sigmoid over classes"),
        ("use_sigmoid=True", "use_sigmoid=False", "a softmax in the RPN"),
        ("sampling_ratio=0", "sampling_ratio=2", "a sampling_ratio of 2 for boxes and a sampling_ratio of 2 for masks"),
        ("type='RoIAlign'", "type='RoIPool'", "boxes of regions by RoIPool and masks of regions by RoIPool"),
        ("type='RoIAlign'", "type='RoIAlign', aligned=False", "RoIAlign of boxes that is not aligned"),
        ("finest_scale=56", "finest_scale=28", "another finest_scale for masks"),
        ("[4, 8, 16, 32],", "[4, 8, 16],", "boxes of the levels of strides"),
        ("mask_thr_binary=0.5", "mask_thr_binary=0.3", "masks over 0.3 in place of 0.5"),
        ("scales=[8]", "scales=[8, 16]", "3 anchors a position; its configuration describes 2 scales"),
        ("max_per_img=1000", "max_per_img=2000", "max_per_img 2000: use a number from 1 to 1000"),
        ("iou_threshold=0.7", "iou_threshold=1.7", "iou_threshold 1.7"),
        ("nms_pre=1000", "nms_pre=0", "0 proposals of a level before NMS"),
        ("output_size=14", "output_size=(99, 99)", "masks of 99 bins"),
        ("nms_pre=1000", "nms_pre=1000, nms_thr=0.6", "the old setting nms_thr 0.6"),
        ("nms_pre=1000", "nms_pre=1000, nms_across_levels=True", "NMS over all levels"),
        ("target_stds=[0.1", "clip_border=False, target_stds=[0.1", "not clipped in roi_head.bbox_head"),
        ("target_stds=[1.0", "type='TBLRBBoxCoder', target_stds=[1.0", "boxes coded by TBLRBBoxCoder in rpn_head"),
        ("sampling_ratio=0", "sampling_ratio=0, pool_mode='max'", "max pooling of boxes"),
    ],
)
def test_settings_that_would_give_other_detections_are_refused(old, new, message, case, tmp_path):
    assert old in CONFIG
    text = CONFIG.replace(old, new)
    if new == "finest_scale=28":
        text = text.replace("mask_roi_extractor=dict(", "mask_roi_extractor=dict(finest_scale=56, ")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(detectors.save(tmp_path / "a.pth", detectors.tensors(case), {"cfg": text}))


BOX, MASK = "roi_head.bbox_head.", "roi_head.mask_head."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{BOX}fc_cls.weight": None}, "fc_cls.weight is missing"),
        ({f"{BOX}fc_cls.bias": None}, "1 missing: roi_head.bbox_head.fc_cls.bias"),
        ({f"{BOX}fc_reg.weight": torch.zeros(24, 48)}, "6 classes and 24 deltas of the box head do not fit"),
        ({f"{BOX}shared_fcs.0.weight": torch.zeros(48, 1569)}, "reads 1569 values of a region"),
        ({f"{BOX}0.fc_cls.weight": torch.zeros(6, 48)}, "several box heads, such as Cascade R-CNN"),
        ({f"{BOX}shared_convs.0.conv.weight": torch.zeros(3)}, "1 unexpected: roi_head.bbox_head.shared_convs"),
        ({f"{MASK}conv_logits.weight": torch.zeros(4, 32, 1, 1)}, "4 maps of the mask head do not fit 5 classes"),
        ({f"{MASK}upsample.weight": None}, "1 missing: roi_head.mask_head.upsample.weight"),
        ({"rpn_head.rpn_cls.weight": torch.zeros(6, 32, 1, 1)}, "the head has 6 anchors a position"),
        ({"backbone.patch_embed.0.weight": None}, "backbone is not EfficientVMamba"),
        ({"neck.lateral_convs.0.gn.weight": torch.ones(32)}, "1 unexpected: neck.lateral_convs.0.gn.weight"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(detectors.saved(tmp_path, NAME, **changes))


def test_the_backbone_alone(case, tmp_path):
    path = detectors.saved(tmp_path, NAME)
    model, spec = load_checkpoint(path, head="features")
    assert spec.outputs == ("feature0", "feature1", "feature2", "feature3")
    with torch.inference_mode():
        maps = model(torch.from_numpy(case.inputs))
    for i, got in enumerate(maps):
        assert got.shape[1] == 16 * 2**i
    with pytest.raises(CheckpointError, match="has no head 'logits'"):
        load_checkpoint(path, head="logits")


# ------------------------------------------------------------------------------------------------------- RoIAlign


def by_hand(maps, box, size, scale):
    """RoIAlign in float64, sample by sample."""
    x1, y1, x2, y2 = (side * scale - 0.5 for side in box)
    _, height, width = maps.shape
    counts = [int(np.ceil((high - low) / size)) for low, high in ((y1, y2), (x1, x2))]

    def at(y, x):
        if not (-1 <= y <= height and -1 <= x <= width):
            return np.zeros(len(maps))
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        low, left = int(y), int(x)
        down, right = min(low + 1, height - 1), min(left + 1, width - 1)
        top = maps[:, low, left] * (1 - x + left) + maps[:, low, right] * (x - left)
        bottom = maps[:, down, left] * (1 - x + left) + maps[:, down, right] * (x - left)
        return top * (1 - y + low) + bottom * (y - low)

    found = np.zeros((len(maps), size, size))
    for i in range(size):
        for j in range(size):
            samples = [
                at(
                    y1 + (i + (p + 0.5) / counts[0]) * (y2 - y1) / size,
                    x1 + (j + (q + 0.5) / counts[1]) * (x2 - x1) / size,
                )
                for p in range(counts[0])
                for q in range(counts[1])
            ]
            found[:, i, j] = np.mean(samples, 0) if samples else 0
    return found


def test_roi_align_by_hand():
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.standard_normal((2, 3, 9, 12)).astype(np.float32))
    corners = rng.uniform(-20, 40, (2, 6, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (2, 6, 2))], 2).astype(np.float32)
    boxes[0, 0], boxes[1, 1] = [5, 5, 5, 5], [-36, -36, -32, -32]
    got = roi_align(maps, torch.from_numpy(boxes) * 0.25, 3).numpy().reshape(2, 6, 3, 3, 3)
    for image in range(2):
        for i in range(6):
            want = by_hand(maps[image].double().numpy(), boxes[image, i].astype(float), 3, 0.25)
            assert np.abs(got[image, i] - want).max() < 1e-5


def test_a_region_is_cropped_from_the_level_of_its_size():
    levels = [torch.full((1, 1, 64 // stride, 64 // stride), float(stride)) for stride in (1, 2, 4, 8)]
    sides = torch.tensor([0, 1, 111.9, 112, 223.9, 224, 447.9, 448, 640])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], 1)[None] / 10
    crops = Atlas.of(levels, (1, 2, 4, 8)).crop(boxes, 2, finest=5.6)
    assert crops[:, 0, 0, 0].tolist() == pytest.approx([0, 1, 1, 2, 2, 4, 4, 8, 8], abs=1e-5)


@pytest.mark.parametrize("sides", [(96, 128), (33, 250), (4, 4)])
def test_levels_side_by_side_give_the_crops_of_each_level(sides):
    """An atlas against RoIAlign on the level of each box; boxes reach the edges of the image."""
    rng = np.random.default_rng(1)
    strides, (height, width) = (4, 8, 16, 32), sides
    shapes = [[max(1, -(-(side // 4) * 4 // stride)) for side in sides] for stride in strides]
    levels = [torch.from_numpy(rng.standard_normal((2, 3, *shape)).astype(np.float32)) for shape in shapes]
    corners = np.sort(rng.uniform(-0.2, 1.2, (2, 30, 2, 2)).clip(0, 1), 2).reshape(2, 30, 4)
    boxes = torch.from_numpy((corners * np.array([width, height] * 2)).astype(np.float32))
    sizes = (boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt() / 7 + 1e-6
    got = Atlas.of(levels, strides).crop(boxes, 5, finest=7).reshape(2, 30, 3, 5, 5)
    used = sizes.log2().floor().clamp(0, 3)
    for i, (stride, level) in enumerate(zip(strides, levels, strict=True)):
        want = roi_align(level, boxes / stride, 5).reshape(2, 30, 3, 5, 5)
        own = (used == i) & (sizes > 0.1)
        assert own.sum() > 3 or max(sides) < 9
        assert not own.any() or (got - want)[own].abs().max() < 1e-4

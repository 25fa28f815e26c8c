"""Load a Faster R-CNN or Mask R-CNN of mmdet on an EfficientVMamba backbone: sizes from shapes, settings from meta."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba.checkpoint import fill
from evm_deploy.model.efficientvmamba.downstream import (
    FEATURES_HINT,
    SourcedSettings,
    backbone_architecture,
    count_of,
    drop_unused,
    load_downstream,
    preprocessing_defaults,
    refuse,
    shape_of,
    spec_of,
)
from evm_deploy.model.efficientvmamba.mmdet import anchors_of, pyramid_of, stages_of
from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network
from evm_deploy.model.openmmlab import TrainingSettings
from evm_deploy.model.state_dict import RawCheckpoint

if TYPE_CHECKING:
    from evm_deploy.model.efficientvmamba.network import Architecture
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes
    from evm_deploy.model.efficientvmamba.rcnn import MaskSizes, RegionCNN, RegionSizes
    from evm_deploy.model.regions import RegionSettings

BOX_HEAD, MASK_HEAD = "roi_head.bbox_head.", "roi_head.mask_head."
KEEP_FLOAT = (
    "backbone.patch_embed.0",
    *("rpn_head.rpn_cls", "rpn_head.rpn_reg", "roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"),
    "roi_head.mask_head.conv_logits",
)
BLOCKS = ("neck.lateral_convs", "neck.fpn_convs", "rpn_head.rpn_conv", "roi_head.bbox_head.shared_fcs")
_shape = partial(shape_of, network="R-CNN")
MAX_BINS = 56  # of a region for the mask head; mmdet has 14
MASK_BLOCKS = ("roi_head.mask_head.convs", "roi_head.mask_head.upsample")


def load(raw: RawCheckpoint, options: LoadOptions) -> Network:
    """Load a Faster or Mask R-CNN of mmdet 2 or 3 with any widths, levels and classes; its backbone for `features`.

    A file without a mask head is a Faster R-CNN. Values that no shape tells come from the configuration in the file,
    else from mmdet's defaults; `details` of the spec has them with their source. Raises CheckpointError with every
    missing, unexpected and misshapen key, and for settings that are not supported.
    """
    return load_downstream(raw, options, "detector", "detections", _load)


RCNN = Family("EfficientVMamba R-CNN", ("rpn_head.rpn_cls.weight",), load)


def _load(raw: RawCheckpoint) -> Network:
    import torch

    from evm_deploy.model.efficientvmamba.rcnn import RegionCNN

    arch = backbone_architecture(raw)
    stages = stages_of(raw, arch)
    settings = SourcedSettings(raw.training)
    pyramid = pyramid_of(raw, arch, stages, settings, pooled=1)
    sizes = _sizes(raw, pyramid.channels)
    region = _region(raw, sizes, pyramid, stages[0], settings)
    refuse(raw, _unsupported(raw.training, region))
    drop_unused(raw, stages)
    with torch.device("meta"):
        model = RegionCNN(arch, stages, pyramid, sizes)
    fill(model, raw)
    model.region = region
    return Network(model, _spec(raw, arch, model, settings))


def _sizes(raw: RawCheckpoint, channels: int) -> RegionSizes:
    """Return the sizes of the heads, from shapes. Raises CheckpointError for shapes that do not fit each other."""
    from evm_deploy.model.efficientvmamba.rcnn import RegionSizes

    if any(key.startswith(f"{BOX_HEAD}0.") for key in raw.tensors):
        raise CheckpointError(
            f"checkpoint {raw.path} holds a detector with several box heads, such as Cascade R-CNN, which is not "
            "supported",
            FEATURES_HINT,
        )
    fcs = count_of(raw, f"{BOX_HEAD}shared_fcs.", "weight")
    widths = tuple(_shape(raw, f"{BOX_HEAD}shared_fcs.{i}.weight", rank=2)[0] for i in range(fcs))
    rows, width = _shape(raw, f"{BOX_HEAD}fc_cls.weight", rank=2)
    deltas = _shape(raw, f"{BOX_HEAD}fc_reg.weight", rank=2)[0]
    read = _shape(raw, f"{BOX_HEAD}shared_fcs.0.weight", rank=2)[1] if fcs else width
    bins, classes = math.isqrt(read // channels), rows - 1
    if bins * bins * channels != read or not bins:
        raise CheckpointError(
            f"checkpoint {raw.path}: the box head reads {read} values of a region, which is no square of "
            f"{channels} channels"
        )
    if classes < 1 or deltas not in (4, 4 * classes):
        raise CheckpointError(f"checkpoint {raw.path}: {rows} classes and {deltas} deltas of the box head do not fit")
    anchors, rpn = _shape(raw, "rpn_head.rpn_cls.weight")[:2]
    class_agnostic = deltas == 4 and classes > 1
    return RegionSizes(channels, rpn, anchors, bins, widths, classes, class_agnostic, _mask(raw, channels, classes))


def _mask(raw: RawCheckpoint, channels: int, classes: int) -> MaskSizes | None:
    """Return the sizes of the mask head; None without one."""
    from evm_deploy.model.efficientvmamba.rcnn import MaskSizes

    if not any(key.startswith(MASK_HEAD) for key in raw.tensors):
        return None
    convs = count_of(raw, f"{MASK_HEAD}convs.")
    widths = (channels, *(_shape(raw, f"{MASK_HEAD}convs.{i}.conv.weight")[0] for i in range(convs)))
    maps, upsampled = _shape(raw, f"{MASK_HEAD}conv_logits.weight")[:2]
    if maps not in (1, classes):
        raise CheckpointError(f"checkpoint {raw.path}: {maps} maps of the mask head do not fit {classes} classes")
    return MaskSizes(widths, upsampled, maps)


def _region(
    raw: RawCheckpoint, sizes: RegionSizes, pyramid: PyramidSizes, first: int, settings: SourcedSettings
) -> RegionSettings:
    """Return the settings of the second stage: of the configuration, else mmdet's.

    first: number of the stage that the finest level reads. Its stride is 4 for stage 0.
    """
    from evm_deploy.model.detection import Anchors
    from evm_deploy.model.regions import FINEST, RegionSettings

    given, default = settings.training, RegionSettings(Anchors())
    strides = tuple(2 ** (first + 2 + i) for i in range(pyramid.levels))
    anchors = anchors_of(raw, sizes.anchors, Anchors(strides=strides, scales=(8.0,)), "rpn_head", settings)
    rpn, extractor = "model.test_cfg.rpn.", "model.roi_head.bbox_roi_extractor."
    try:
        proposals = SelectionSettings(
            score_thr=0.0,
            iou=settings.value("rpn_iou", f"{rpn}nms.iou_threshold", (int, float), 0.7),
            max_det=settings.value("proposals", f"{rpn}max_per_img", int, 1000),
        )
    except ValueError as error:
        text = str(error).replace("max_det", "max_per_img").replace("iou ", "iou_threshold ")
        raise CheckpointError(f"checkpoint {raw.path}: model.test_cfg.rpn of its configuration: {text}") from error
    coder = "model.roi_head.bbox_head.bbox_coder."
    means = given.numbers(f"{coder}target_means", 4)
    stds = given.numbers(f"{coder}target_stds", 4)
    settings.take("stds", stds or default.stds, f"meta.cfg {coder}target_stds" if stds else "default")
    region = RegionSettings(
        anchors,
        proposals,
        settings.value("rpn_before", f"{rpn}nms_pre", int, default.before),
        settings.value("min_bbox_size", f"{rpn}min_bbox_size", (int, float), 0),
        strides[: len(pyramid.inputs)],
        settings.value("finest_scale", f"{extractor}finest_scale", (int, float), FINEST),
        sizes.bins,
        _bins(settings, default.mask_bins),
        means or default.means,
        stds or default.stds,
    )
    if region.before < 1 or not 1 <= region.mask_bins <= MAX_BINS or region.finest <= 0:
        raise CheckpointError(
            f"checkpoint {raw.path}: its configuration asks for {region.before} proposals of a level before NMS, masks "
            f"of {region.mask_bins} bins, and a finest scale of {region.finest:g}",
            f"all must be over 0, and bins at most {MAX_BINS}",
        )
    return region


def _bins(settings: SourcedSettings, default: int) -> int:
    """Return the number of bins of a region for the mask head, which no shape tells: one number, or twice the same."""
    at = "model.roi_head.mask_roi_extractor.roi_layer.output_size"
    pair = settings.training.numbers(at, 2)
    if pair and pair[0] == pair[1]:
        return int(settings.take("mask_bins", int(pair[0]), f"meta.cfg {at}"))
    return int(settings.value("mask_bins", at, int, default))


def _unsupported(given: TrainingSettings, region: RegionSettings) -> dict[str, bool]:
    """Return settings that give other detections than ours, as text -> whether the configuration has them."""
    test, threshold = "model.test_cfg.", given.get("model.test_cfg.rcnn.mask_thr_binary", (int, float))
    found = {
        "NMS over all levels of the RPN": given.get(f"{test}rpn.nms_across_levels", bool) is True,
        f"masks over {threshold} in place of 0.5": threshold not in (None, 0.5),
        "a softmax in the RPN": given.get("model.rpn_head.loss_cls.use_sigmoid", bool) is False,
        "a sigmoid over classes": given.get("model.roi_head.bbox_head.loss_cls.use_sigmoid", bool) is True,
        "sides of anchors that are not the strides": given.get("model.rpn_head.anchor_generator.base_sizes", list)
        is not None,
    }
    for name, used in (("nms_thr", region.proposals.iou), ("max_num", region.proposals.max_det)):  # before mmdet 2.6
        value = given.get(f"{test}rpn.{name}", (int, float))
        found[f"the old setting {name} {value} of the RPN"] = value not in (None, used)
    for stage in ("rpn", "rcnn"):
        kind = given.get(f"{test}{stage}.nms.type", str)
        agnostic = given.get(f"{test}{stage}.nms.class_agnostic", bool)
        found[f"NMS of type {kind!r} in {stage}"] = kind not in (None, "nms")
        found[f"NMS without regard to classes in {stage}"] = agnostic is True
    for head in ("rpn_head", "roi_head.bbox_head"):
        coder = f"model.{head}.bbox_coder."
        kind = given.get(f"{coder}type", str)
        found[f"boxes coded by {kind} in {head}"] = kind not in (None, "DeltaXYWHBBoxCoder")
        found[f"boxes that are not clipped in {head}"] = given.get(f"{coder}clip_border", bool) is False
        found[f"clamped centres of boxes in {head}"] = given.get(f"{coder}add_ctr_clamp", bool) is True
        found[f"boxes that are regressed decoded in {head}"] = given.get(f"model.{head}.reg_decoded_bbox", bool) is True
    for name, what in (("bbox", "boxes"), ("mask", "masks")):
        found |= _other_crops(given, region, f"model.roi_head.{name}_roi_extractor.", what)
    return found


def _other_crops(given: TrainingSettings, region: RegionSettings, at: str, what: str) -> dict[str, bool]:
    """Return settings of a crop of regions that differ from ours, as text -> whether the configuration has them."""
    extractor, layer, pooling = (
        given.get(f"{at}{key}", str) for key in ("type", "roi_layer.type", "roi_layer.pool_mode")
    )
    samples = given.get(f"{at}roi_layer.sampling_ratio", (int, float))
    strides, finest = given.numbers(f"{at}featmap_strides"), given.get(f"{at}finest_scale", (int, float))
    return {
        f"{what} of regions by {extractor}": extractor not in (None, "SingleRoIExtractor"),
        f"{what} of regions by {layer}": layer not in (None, "RoIAlign"),
        f"{pooling} pooling of {what}": pooling not in (None, "avg"),
        f"a sampling_ratio of {samples} for {what}": (samples or 0) > 0,
        f"RoIAlign of {what} that is not aligned": given.get(f"{at}roi_layer.aligned", bool) is False,
        f"{what} of the levels of strides {strides}": strides not in (None, tuple(map(float, region.strides))),
        f"another finest_scale for {what}": finest not in (None, region.finest),
    }


def _spec(raw: RawCheckpoint, arch: Architecture, model: RegionCNN, settings: SourcedSettings) -> ModelSpec:
    test = "model.test_cfg.rcnn."
    defaults: dict[str, Any] = {
        **preprocessing_defaults(raw.training),
        "score_thr": settings.value("score_thr", test + "score_thr", (int, float), 0.05),
        "iou": settings.value("iou", test + "nms.iou_threshold", (int, float), 0.5),
        "max_det": settings.value("max_det", test + "max_per_img", int, 100),
        **raw.metadata,
    }
    masks = model.roi_head.mask_head is not None
    return spec_of(
        raw,
        arch,
        model,
        family=f"EfficientVMamba {'Mask' if masks else 'Faster'} R-CNN",
        task="detection",
        outputs=model.outputs,
        num_classes=model.classes,
        blocks=(*BLOCKS, *(MASK_BLOCKS if masks else ())),
        keep_float=KEEP_FLOAT if masks else KEEP_FLOAT[:-1],
        regions=True,
        defaults=defaults,
        details={"detector": settings.found},
    )

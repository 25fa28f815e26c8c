"""Load a detector of mmdet on an EfficientVMamba backbone: sizes from shapes, settings from the configuration."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba.checkpoint import fill
from evm_deploy.model.efficientvmamba.downstream import (
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
from evm_deploy.model.state_dict import RawCheckpoint

if TYPE_CHECKING:
    from evm_deploy.model.efficientvmamba.network import Architecture
    from evm_deploy.model.efficientvmamba.retinanet import HeadSizes, RetinaNet

ANCHORS = ("bbox_head.retina_cls.weight",)
# Quantised box deltas and logits cost most of the accuracy that int8 detectors lose
KEEP_FLOAT = ("backbone.patch_embed.0", "bbox_head.retina_cls", "bbox_head.retina_reg")
BLOCKS = ("neck.lateral_convs", "neck.fpn_convs", "bbox_head.cls_convs", "bbox_head.reg_convs")
_shape = partial(shape_of, network="RetinaNet")


def load(raw: RawCheckpoint, options: LoadOptions) -> Network:
    """Load a RetinaNet of mmdet 2 or 3 with any widths, levels, anchors and classes; its backbone for head `features`.

    Values that no shape tells come from the configuration in the file, else from mmdet's defaults; `details` of the
    spec has them with their source. Raises CheckpointError with every missing, unexpected and misshapen key, and for
    settings that are not supported, such as soft NMS.
    """
    return load_downstream(raw, options, "detector", "detections", _load)


DETECTOR = Family("EfficientVMamba RetinaNet", ANCHORS, load)


def _load(raw: RawCheckpoint) -> Network:
    import torch

    from evm_deploy.model.detection import Anchors
    from evm_deploy.model.efficientvmamba.retinanet import RetinaNet

    arch = backbone_architecture(raw)
    stages = stages_of(raw, arch)
    settings = SourcedSettings(raw.training)
    pyramid, head = pyramid_of(raw, arch, stages, settings), _head(raw)
    default = Anchors(strides=tuple(2 ** (stages[0] + 2 + i) for i in range(pyramid.levels)))
    anchors = anchors_of(raw, head.anchors, default, "bbox_head", settings)
    _refuse_unsupported(raw)
    drop_unused(raw, stages)
    with torch.device("meta"):
        model = RetinaNet(arch, stages, pyramid, head)
    fill(model, raw)
    model.anchors = anchors
    model.before = settings.value("nms_pre", "model.test_cfg.nms_pre", int, 1000)
    model.min_size = settings.value("min_bbox_size", "model.test_cfg.min_bbox_size", (int, float), 0)
    return Network(model, _spec(raw, arch, model, settings))


def _head(raw: RawCheckpoint) -> HeadSizes:
    from evm_deploy.model.efficientvmamba.retinanet import HeadSizes

    rows, width = _shape(raw, "bbox_head.retina_cls.weight")[:2]
    deltas = _shape(raw, "bbox_head.retina_reg.weight")[0]
    stacked = count_of(raw, "bbox_head.cls_convs.")
    if deltas % 4 or not deltas or rows % (deltas // 4):
        raise CheckpointError(
            f"checkpoint {raw.path}: {rows} class maps and {deltas} box maps of the head fit no number of anchors"
        )
    channels = _shape(raw, "bbox_head.cls_convs.0.conv.weight")[1] if stacked else width
    return HeadSizes(channels, width, stacked, deltas // 4, rows // (deltas // 4))


def _refuse_unsupported(raw: RawCheckpoint) -> None:
    """Raise CheckpointError for settings of the configuration that give other detections than ours."""
    given = raw.training
    kind = given.get("model.test_cfg.nms.type", str)
    refuse(
        raw,
        {
            f"NMS of type {kind!r}": kind not in (None, "nms"),
            "NMS without regard to classes": given.get("model.test_cfg.nms.class_agnostic", bool) is True,
            "a softmax over classes": given.get("model.bbox_head.loss_cls.use_sigmoid", bool) is False,
            "boxes that are regressed decoded": given.get("model.bbox_head.reg_decoded_bbox", bool) is True,
            "sides of anchors that are not the strides": given.get("model.bbox_head.anchor_generator.base_sizes", list)
            is not None,
        },
    )


def _spec(raw: RawCheckpoint, arch: Architecture, model: RetinaNet, settings: SourcedSettings) -> ModelSpec:
    test = "model.test_cfg."
    defaults = {
        **preprocessing_defaults(raw.training),
        "score_thr": settings.value("score_thr", test + "score_thr", (int, float), 0.05),
        "iou": settings.value("iou", test + "nms.iou_threshold", (int, float), 0.5),
        "max_det": settings.value("max_det", test + "max_per_img", int, 100),
        **raw.metadata,
    }
    return spec_of(
        raw,
        arch,
        model,
        family=DETECTOR.name,
        task="detection",
        outputs=model.outputs,
        num_classes=model.classes,
        blocks=BLOCKS,
        keep_float=KEEP_FLOAT,
        defaults=defaults,
        details={"detector": settings.found},
    )

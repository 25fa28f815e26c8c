"""Load a detector of mmdet on an EfficientVMamba backbone: sizes from shapes, settings from the configuration."""

from __future__ import annotations

from dataclasses import asdict, replace
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
from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network
from evm_deploy.model.state_dict import RawCheckpoint

if TYPE_CHECKING:
    from evm_deploy.model.detection import Anchors
    from evm_deploy.model.efficientvmamba.network import Architecture
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes
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

    from evm_deploy.model.efficientvmamba.retinanet import RetinaNet

    arch = backbone_architecture(raw)
    stages = _stages(raw, arch)
    settings = SourcedSettings(raw.training)
    pyramid, head = _pyramid(raw, arch, stages, settings), _head(raw)
    anchors = _anchors(raw, head.anchors, pyramid.levels, stages[0], settings)
    _refuse_unsupported(raw)
    drop_unused(raw, stages)
    with torch.device("meta"):
        model = RetinaNet(arch, stages, pyramid, head)
    fill(model, raw)
    model.anchors = anchors
    model.before = settings.value("nms_pre", "model.test_cfg.nms_pre", int, 1000)
    model.min_size = settings.value("min_bbox_size", "model.test_cfg.min_bbox_size", (int, float), 0)
    return Network(model, _spec(raw, arch, model, settings))


def _stages(raw: RawCheckpoint, arch: Architecture) -> tuple[int, ...]:
    """Return the stages whose maps the pyramid reads, from the widths of its lateral convolutions."""
    widths = [
        _shape(raw, f"neck.lateral_convs.{j}.conv.weight")[1] for j in range(count_of(raw, "neck.lateral_convs."))
    ]
    stages = tuple(arch.dims.index(width) for width in widths if width in arch.dims)
    if not widths or len(stages) < len(widths) or stages != tuple(range(stages[0], len(arch.dims))):
        raise CheckpointError(
            f"checkpoint {raw.path}: the pyramid reads maps of {widths} channels, the backbone has {list(arch.dims)}; "
            "supported are the last ones, in order"
        )
    return stages


def _pyramid(
    raw: RawCheckpoint, arch: Architecture, stages: tuple[int, ...], settings: SourcedSettings
) -> PyramidSizes:
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes

    inputs = tuple(arch.dims[i] for i in stages)
    channels, convs = _shape(raw, "neck.lateral_convs.0.conv.weight")[0], count_of(raw, "neck.fpn_convs.")
    levels = settings.value("levels", "model.neck.num_outs", int, convs)
    if convs == len(inputs):
        return PyramidSizes(inputs, channels, levels, "pooled" if levels > convs else "none")
    said = settings.training.get("model.neck.add_extra_convs", (str, bool))
    width = _shape(raw, f"neck.fpn_convs.{len(inputs)}.conv.weight")[1]
    fitting = [
        name
        for name, has in (("on_input", inputs[-1]), ("on_output", channels), ("on_lateral", channels))
        if has == width
    ]
    said = "on_input" if said is True else said
    if said in fitting:
        extra = settings.take("extra_levels", said, "meta.cfg model.neck.add_extra_convs")
    elif fitting:
        extra = settings.take("extra_levels", fitting[0], "shapes" if len(fitting) == 1 else "default")
    else:
        raise CheckpointError(f"checkpoint {raw.path}: the extra levels of the pyramid read {width} channels")
    relu = settings.training.get("model.neck.relu_before_extra_convs", bool) or False
    return PyramidSizes(inputs, channels, convs, extra, relu)


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


def _anchors(raw: RawCheckpoint, each: int, levels: int, first: int, settings: SourcedSettings) -> Anchors:
    """Return the anchors: of the configuration, else mmdet's for RetinaNet, whose number must fit the head.

    first: number of the stage that the finest level reads. Its stride is 4 for stage 0.
    """
    from evm_deploy.model.detection import Anchors

    at, given = "model.bbox_head.anchor_generator.", settings.training
    base, per_octave = given.get(at + "octave_base_scale", (int, float)), given.get(at + "scales_per_octave", int)
    scales = given.numbers(at + "scales")
    if scales is None and base is not None and per_octave:
        scales = tuple(base * 2 ** (i / per_octave) for i in range(per_octave))
    ratios, strides = given.numbers(at + "ratios"), given.numbers(at + "strides", levels)
    default = Anchors(strides=tuple(2 ** (first + 2 + i) for i in range(levels)))
    anchors = replace(
        default,
        scales=scales or default.scales,
        ratios=ratios or default.ratios,
        strides=tuple(map(int, strides)) if strides else default.strides,
        offset=given.get(at + "center_offset", (int, float)) or 0.0,
        means=given.numbers("model.bbox_head.bbox_coder.target_means", 4) or default.means,
        stds=given.numbers("model.bbox_head.bbox_coder.target_stds", 4) or default.stds,
    )
    if anchors.each != each:
        raise CheckpointError(
            f"checkpoint {raw.path}: the head has {each} anchors a position; "
            + ("its configuration describes" if scales or ratios else "without a configuration they would be")
            + f" {len(anchors.scales)} scales and {len(anchors.ratios)} ratios",
            "give the checkpoint as mmdet wrote it, with meta.cfg",
        )
    settings.take("anchors", asdict(anchors), f"meta.cfg {at[:-1]}" if scales and ratios and strides else "default")
    return anchors


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

"""Load a detector of mmdet on an EfficientVMamba backbone: sizes from shapes, settings from the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba import checkpoint
from evm_deploy.model.efficientvmamba.checkpoint import block_paths, fill, infer_architecture
from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network
from evm_deploy.model.openmmlab import TrainingSettings
from evm_deploy.model.state_dict import RawCheckpoint, network_name, rename

if TYPE_CHECKING:
    from torch import Tensor

    from evm_deploy.model.detection import Anchors
    from evm_deploy.model.efficientvmamba.network import Architecture
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes
    from evm_deploy.model.efficientvmamba.retinanet import HeadSizes, RetinaNet

BACKBONE = "backbone."
ANCHORS = ("bbox_head.retina_cls.weight",)
# Quantised box deltas and logits cost most of the accuracy that int8 detectors lose
KEEP_FLOAT = ("backbone.patch_embed.0", "bbox_head.retina_cls", "bbox_head.retina_reg")
PAD_TO = 32
BLOCKS = ("neck.lateral_convs", "neck.fpn_convs", "bbox_head.cls_convs", "bbox_head.reg_convs")


def load(raw: RawCheckpoint, options: LoadOptions) -> Network:
    """Load a RetinaNet of mmdet 2 or 3 with any widths, levels, anchors and classes; its backbone for head `features`.

    Values that no shape tells come from the configuration in the file, else from mmdet's defaults; `details` of the
    spec has them with their source. Raises CheckpointError with every missing, unexpected and misshapen key, and for
    settings that are not supported, such as soft NMS.
    """
    if options.head == "features":
        return checkpoint.load(_backbone(raw), options)
    if options.head not in (None, "detections"):
        raise CheckpointError(
            f"checkpoint {raw.path} holds a detector, which has no head '{options.head}'",
            "leave --head out, or export the feature maps of its backbone with --head features",
        )
    import torch

    from evm_deploy.model.detection import Anchors
    from evm_deploy.model.efficientvmamba.retinanet import RetinaNet

    raw = _renamed(raw)
    arch = replace(infer_architecture(raw.path, _inner(raw.tensors)), num_classes=0)
    stages = _stages(raw, arch)
    settings = _Sourced(raw.training)
    pyramid, head = _pyramid(raw, arch, stages, settings), _head(raw)
    default = Anchors(strides=tuple(2 ** (stages[0] + 2 + i) for i in range(pyramid.levels)))
    anchors = _anchors(raw, head.anchors, default, "bbox_head", settings)
    _refuse(raw, _unsupported(raw.training))
    _drop_unused(raw, stages)
    with torch.device("meta"):
        model = RetinaNet(arch, stages, pyramid, head)
    fill(model, raw)
    model.anchors = anchors
    model.before = settings.value("nms_pre", "model.test_cfg.nms_pre", int, 1000)
    model.min_size = settings.value("min_bbox_size", "model.test_cfg.min_bbox_size", (int, float), 0)
    return Network(model, _spec(raw, arch, model, settings))


DETECTOR = Family("EfficientVMamba RetinaNet", ANCHORS, load)


@dataclass
class _Sourced:
    """Reader of settings that remembers where each came from. found: name -> {value, from}."""

    training: TrainingSettings

    def __post_init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def value(self, name: str, path: str, kind: Any, default: Any) -> Any:
        """Return the value at `path` of the configuration, else the default."""
        value = self.training.get(path, kind)
        return self.take(name, default if value is None else value, "default" if value is None else f"meta.cfg {path}")

    def take(self, name: str, value: Any, source: str) -> Any:
        """Record a value with its source, and return it."""
        self.found[name] = {"value": value, "from": source}
        return value


def _renamed(raw: RawCheckpoint) -> RawCheckpoint:
    """Return the checkpoint with current names in its backbone. Raises CheckpointError for another backbone."""
    inner = rename(_backbone(raw), checkpoint.RENAMES).tensors
    rest = {key: value for key, value in raw.tensors.items() if not key.startswith(BACKBONE)}
    raw = replace(raw, tensors={**{BACKBONE + key: value for key, value in inner.items()}, **rest})
    if "patch_embed.0.weight" not in _inner(raw.tensors):
        raise CheckpointError(
            f"checkpoint {raw.path} holds a detector whose backbone is not EfficientVMamba",
            "export a network of your own with --model",
        )
    return raw


def _inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the backbone under their names in it."""
    return {key.removeprefix(BACKBONE): value for key, value in tensors.items() if key.startswith(BACKBONE)}


def _backbone(raw: RawCheckpoint) -> RawCheckpoint:
    """Return the checkpoint of the backbone alone."""
    other = [key for key in raw.tensors if not key.startswith(BACKBONE)]
    return replace(raw, tensors=_inner(raw.tensors), prefix=raw.prefix + BACKBONE, dropped=[*raw.dropped, *other])


def _shape(raw: RawCheckpoint, key: str, rank: int = 4) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises CheckpointError if it is missing or of another rank."""
    if key not in raw.tensors or raw.tensors[key].dim() != rank:
        found = f"is {list(raw.tensors[key].shape)}" if key in raw.tensors else "is missing"
        raise CheckpointError(
            f"checkpoint {raw.path}: {key} {found}, a detector has it with {rank} axes",
            "the file holds a part of the network, or another one",
        )
    return tuple(raw.tensors[key].shape)


def _count(raw: RawCheckpoint, prefix: str, layer: str = "conv.weight") -> int:
    """Return the number of layers of a list: `prefix`0.conv.weight and so on."""
    found = {int(match[1]) for key in raw.tensors if (match := re.fullmatch(rf"{prefix}(\d+)\.{layer}", key))}
    if found != set(range(len(found))):
        raise CheckpointError(f"checkpoint {raw.path}: numbers {sorted(found)[:6]} of {prefix}* have gaps")
    return len(found)


def _stages(raw: RawCheckpoint, arch: Architecture) -> tuple[int, ...]:
    """Return the stages whose maps the pyramid reads, from the widths of its lateral convolutions."""
    widths = [_shape(raw, f"neck.lateral_convs.{j}.conv.weight")[1] for j in range(_count(raw, "neck.lateral_convs."))]
    stages = tuple(arch.dims.index(width) for width in widths if width in arch.dims)
    if not widths or len(stages) < len(widths) or stages != tuple(range(stages[0], len(arch.dims))):
        raise CheckpointError(
            f"checkpoint {raw.path}: the pyramid reads maps of {widths} channels, the backbone has {list(arch.dims)}; "
            "supported are the last ones, in order"
        )
    return stages


def _pyramid(
    raw: RawCheckpoint, arch: Architecture, stages: tuple[int, ...], settings: _Sourced, pooled: int = 0
) -> PyramidSizes:
    """Return the sizes of the feature pyramid. pooled: levels by pooling that mmdet's default configuration has."""
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes

    inputs = tuple(arch.dims[i] for i in stages)
    channels, convs = _shape(raw, "neck.lateral_convs.0.conv.weight")[0], _count(raw, "neck.fpn_convs.")
    levels = settings.value("levels", "model.neck.num_outs", int, convs + pooled)
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
    stacked = _count(raw, "bbox_head.cls_convs.")
    if deltas % 4 or not deltas or rows % (deltas // 4):
        raise CheckpointError(
            f"checkpoint {raw.path}: {rows} class maps and {deltas} box maps of the head fit no number of anchors"
        )
    channels = _shape(raw, "bbox_head.cls_convs.0.conv.weight")[1] if stacked else width
    return HeadSizes(channels, width, stacked, deltas // 4, rows // (deltas // 4))


def _anchors(raw: RawCheckpoint, each: int, default: Anchors, head: str, settings: _Sourced) -> Anchors:
    """Return the anchors: of the configuration, else `default`, of mmdet. Their number must be `each`, the head's.

    head: name of the head in the configuration.
    """
    at, given, levels = f"model.{head}.anchor_generator.", settings.training, len(default.strides)
    base, per_octave = given.get(at + "octave_base_scale", (int, float)), given.get(at + "scales_per_octave", int)
    scales = given.numbers(at + "scales")
    if scales is None and base is not None and per_octave:
        scales = tuple(base * 2 ** (i / per_octave) for i in range(per_octave))
    ratios, strides = given.numbers(at + "ratios"), given.numbers(at + "strides", levels)
    anchors = replace(
        default,
        scales=scales or default.scales,
        ratios=ratios or default.ratios,
        strides=tuple(map(int, strides)) if strides else default.strides,
        offset=given.get(at + "center_offset", (int, float)) or 0.0,
        means=given.numbers(f"model.{head}.bbox_coder.target_means", 4) or default.means,
        stds=given.numbers(f"model.{head}.bbox_coder.target_stds", 4) or default.stds,
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


def _unsupported(given: TrainingSettings) -> dict[str, bool]:
    """Return settings that give other detections than ours, as text -> whether the configuration has them."""
    kind = given.get("model.test_cfg.nms.type", str)
    return {
        f"NMS of type {kind!r}": kind not in (None, "nms"),
        "images in the order BGR": given.get("model.data_preprocessor.bgr_to_rgb", bool) is False,
        "NMS without regard to classes": given.get("model.test_cfg.nms.class_agnostic", bool) is True,
        "a softmax over classes": given.get("model.bbox_head.loss_cls.use_sigmoid", bool) is False,
        "boxes that are regressed decoded": given.get("model.bbox_head.reg_decoded_bbox", bool) is True,
        "sides of anchors that are not the strides": given.get("model.bbox_head.anchor_generator.base_sizes", list)
        is not None,
    }


def _refuse(raw: RawCheckpoint, unsupported: Mapping[str, bool]) -> None:
    """Raise CheckpointError naming the settings of the configuration that are not supported."""
    found = [what for what, is_so in unsupported.items() if is_so]
    if found:
        raise CheckpointError(
            f"checkpoint {raw.path}: its configuration asks for {' and '.join(found)}, which is not supported",
            "export the feature maps of its backbone with --head features",
        )


def _drop_unused(raw: RawCheckpoint, stages: tuple[int, ...]) -> None:
    """Drop the backbone's classifier, and norms of maps that nothing reads."""
    norms = tuple(f"{BACKBONE}outnorm{i}." for i in range(checkpoint.STAGES) if i not in stages)
    for key in [key for key in raw.tensors if key.startswith((f"{BACKBONE}classifier.", *norms))]:
        raw.dropped.append(key)
        del raw.tensors[key]


def _spec(raw: RawCheckpoint, arch: Architecture, model: RetinaNet, settings: _Sourced) -> ModelSpec:
    test = "model.test_cfg."
    defaults = {
        **_defaults(raw),
        "score_thr": settings.value("score_thr", test + "score_thr", (int, float), 0.05),
        "iou": settings.value("iou", test + "nms.iou_threshold", (int, float), 0.5),
        "max_det": settings.value("max_det", test + "max_per_img", int, 100),
        **raw.metadata,
    }
    return ModelSpec(
        name=network_name(raw),
        family=DETECTOR.name,
        variant=arch.variant,
        task="detection",
        outputs=model.outputs,
        num_classes=model.classes,
        parameters=sum(p.numel() for p in model.parameters()),
        checkpoint=raw.facts(),
        min_pixels=checkpoint.MIN_PIXELS,
        blocks=(*(BACKBONE + path for path in block_paths(model.backbone)), *BLOCKS),
        keep_float=KEEP_FLOAT,
        notes=tuple(raw.notes),
        defaults=defaults,
        details={"architecture": asdict(arch), "detector": settings.found},
    )


def _defaults(raw: RawCheckpoint) -> dict[str, Any]:
    """Return preprocessing and labels of the training run: of the file, else as mmdet does it by default.

    An image is resized to fit into `scale` (long, short side), and padded to a multiple of PAD_TO.
    """
    found: dict[str, Any] = {"labels": list(raw.training.classes)} if raw.training.classes else {}
    steps = raw.training.get("test_pipeline", list) or []
    resizes = [step for step in steps if isinstance(step, Mapping) and step.get("type") == "Resize"]
    resize = TrainingSettings(resizes[0]) if len(resizes) == 1 else TrainingSettings()
    found |= {"resize": "stretch" if resize.get("keep_ratio") is False else "pad", "interpolation": "bilinear-opencv"}
    scale = resize.numbers("scale", 2)
    if scale and min(scale) >= 1:
        sides = (min(scale), max(scale)) if found["resize"] == "pad" else scale[::-1]
        found["imgsz"] = "x".join(str(-(-int(side) // PAD_TO) * PAD_TO) for side in sides)
    for name in ("mean", "std"):
        values = raw.training.numbers(f"model.data_preprocessor.{name}", 3)
        if values:
            found[name] = tuple(value / 255 for value in values)
    return found

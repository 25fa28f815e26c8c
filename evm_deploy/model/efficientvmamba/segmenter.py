"""Load a segmenter of mmseg on an EfficientVMamba backbone: sizes from shapes, settings from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
from evm_deploy.model.network import Family, LoadOptions, ModelSpec, Network
from evm_deploy.model.state_dict import RawCheckpoint

if TYPE_CHECKING:
    from evm_deploy.model.efficientvmamba.network import Architecture
    from evm_deploy.model.efficientvmamba.upernet import UPerNet, UPerSizes

ANCHORS = ("decode_head.conv_seg.weight",)
# The last convolution writes the logits that are compared. Pooled maps have 1 to 36 values for each channel, too few
# for a range. Products with constant matrices, which resize, have no weights.
KEEP_FLOAT = ("backbone.patch_embed.0", "decode_head.psp_modules", "decode_head.resize", "decode_head.conv_seg")
BLOCKS = (
    "decode_head.bottleneck",
    "decode_head.lateral_convs",
    "decode_head.fpn_convs",
    "decode_head.fpn_bottleneck",
)
POOLS = (1, 2, 3, 6)
IMGSZ = "512x512"  # crop that mmseg trains with by default
HEAD, TEST = "model.decode_head.", "model.test_cfg."
_shape = partial(shape_of, network="UPerNet")


def load(raw: RawCheckpoint, options: LoadOptions) -> Network:
    """Load a UPerNet of mmseg 0 or 1 with any widths, levels and classes; its backbone for head `features`.

    The auxiliary head is dropped. Values that no shape tells come from the configuration in the file, else from mmseg's
    defaults; `details` of the spec has them with their source. Raises CheckpointError with every missing, unexpected
    and misshapen key, and for settings that are not supported, such as the test mode `slide`.
    """
    return load_downstream(raw, options, "segmenter", "label_map", _load)


SEGMENTER = Family("EfficientVMamba UPerNet", ANCHORS, load)


def _load(raw: RawCheckpoint) -> Network:
    import torch

    from evm_deploy.model.efficientvmamba.upernet import UPerNet

    _refuse_unsupported(raw)
    arch = backbone_architecture(raw)
    stages = _stages(raw, arch)
    settings = SourcedSettings(raw.training)
    sizes = _sizes(raw, arch, stages, settings)
    drop_unused(raw, stages)
    with torch.device("meta"):
        model = UPerNet(arch, stages, sizes)
    fill(model, raw)
    if sizes.classes == 1:
        model.threshold = _threshold(raw, settings)
    return Network(model, _spec(raw, arch, model, settings))


def _stages(raw: RawCheckpoint, arch: Architecture) -> tuple[int, ...]:
    """Return the stages whose maps the head reads, from the widths of its lateral convolutions and of its pooling."""
    prefix = "decode_head.lateral_convs."
    widths = [_shape(raw, f"{prefix}{i}.conv.weight")[1] for i in range(count_of(raw, prefix))]
    widths.append(_shape(raw, "decode_head.psp_modules.0.1.conv.weight")[1])
    stages = tuple(arch.dims.index(width) for width in widths if width in arch.dims)
    if len(stages) < len(widths) or any(a >= b for a, b in pairwise(stages)):
        raise CheckpointError(
            f"checkpoint {raw.path}: the head reads maps of {widths} channels, the backbone has {list(arch.dims)}; "
            "supported are any of them, in order"
        )
    return stages


def _sizes(raw: RawCheckpoint, arch: Architecture, stages: tuple[int, ...], settings: SourcedSettings) -> UPerSizes:
    from evm_deploy.model.efficientvmamba.upernet import UPerSizes

    count = count_of(raw, "decode_head.psp_modules.", "1.conv.weight")
    given = settings.training.numbers(f"{HEAD}pool_scales")
    pools = tuple(map(int, given or POOLS))
    if len(pools) != count or min(pools) < 1:
        said = "its configuration says" if given else "without a configuration they would be"
        raise CheckpointError(
            f"checkpoint {raw.path}: the head pools to {count} sizes; {said} {list(pools)}",
            "give the checkpoint as mmseg wrote it, with meta.cfg",
        )
    settings.take("pool_scales", list(pools), f"meta.cfg {HEAD}pool_scales" if given else "default")
    classes, channels = _shape(raw, "decode_head.conv_seg.weight")[:2]
    inputs = tuple(arch.dims[i] for i in stages)
    aligned = settings.value("align_corners", f"{HEAD}align_corners", bool, False)
    return UPerSizes(inputs, channels, pools, classes, aligned)


def _threshold(raw: RawCheckpoint, settings: SourcedSettings) -> float:
    """Return the score from which on a pixel is of the one class. Raises CheckpointError for one out of range."""
    threshold = float(settings.value("threshold", f"{HEAD}threshold", (int, float), 0.3))
    if not 0 < threshold < 1:
        raise CheckpointError(f"checkpoint {raw.path}: the threshold of its head is {threshold}, not between 0 and 1")
    return threshold


def _refuse_unsupported(raw: RawCheckpoint) -> None:
    """Raise CheckpointError for another head than UPerNet's, and for settings that give other maps than ours."""
    given = raw.training
    kind = given.get(f"{HEAD}type", str)
    if "decode_head.psp_modules.0.1.conv.weight" not in raw.tensors or kind not in (None, "UPerHead"):
        raise CheckpointError(
            f"checkpoint {raw.path} holds a segmenter with the head {kind or '(not named)'}; supported is UPerHead",
            FEATURES_HINT,
        )
    mode, activation = given.get(f"{TEST}mode", str), given.get(f"{HEAD}act_cfg.type", str)
    epsilon = given.get(f"{HEAD}norm_cfg.eps", (int, float))
    refuse(
        raw,
        {
            f"the test mode {mode!r}": mode not in (None, "whole"),
            f"the activation {activation}": activation not in (None, "ReLU"),
            f"norms with eps {epsilon}": epsilon not in (None, 1e-5),
            "convolutions of another kind": given.get(f"{HEAD}conv_cfg", Mapping) is not None,
        },
    )


def _spec(raw: RawCheckpoint, arch: Architecture, model: UPerNet, settings: SourcedSettings) -> ModelSpec:
    training, classes = raw.training, max(2, model.sizes.classes)
    steps = [each for each in training.get("test_pipeline", list) or [] if isinstance(each, Mapping)]
    zero = [each.get("reduce_zero_label") for each in steps if each.get("type") == "LoadAnnotations"]
    if True in zero or False in zero:
        settings.take("reduce_zero_label", True in zero, "meta.cfg test_pipeline")
    palette = {"palette": [list(each) for each in training.palette]} if len(training.palette) == classes else {}
    return spec_of(
        raw,
        arch,
        model,
        family=SEGMENTER.name,
        task="segmentation",
        outputs=model.outputs,
        num_classes=classes,
        blocks=BLOCKS,
        keep_float=KEEP_FLOAT,
        defaults={**preprocessing_defaults(training), **_trained(raw, model), **raw.metadata},
        details={"segmenter": settings.found, **palette},
    )


def _trained(raw: RawCheckpoint, model: UPerNet) -> dict[str, Any]:
    """Return image size and labels that differ from those of a detector.

    The size is that of the crops in training: images of a test have any size. One class is told apart from its absence:
    if the file names it alone, class 0 is called background.
    """
    size = raw.training.numbers("model.data_preprocessor.size", 2) or raw.training.numbers("crop_size", 2)
    found: dict[str, Any] = {"imgsz": f"{int(size[0])}x{int(size[1])}" if size and min(size) >= 1 else IMGSZ}
    if model.sizes.classes == 1 and len(raw.training.classes) == 1:
        found["labels"] = ["background", *raw.training.classes]
        raw.notes.append("the head has one class: class 0, its absence, is called background")
    return found

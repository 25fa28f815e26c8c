"""Read the pyramid and the anchors of a detector of mmdet: sizes from shapes, settings from the configuration."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from evm_deploy.errors import CheckpointError
from evm_deploy.model.efficientvmamba.downstream import SourcedSettings, count_of, shape_of
from evm_deploy.model.state_dict import RawCheckpoint

if TYPE_CHECKING:
    from evm_deploy.model.detection import Anchors
    from evm_deploy.model.efficientvmamba.network import Architecture
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes

_shape = partial(shape_of, network="detector")


def stages_of(raw: RawCheckpoint, arch: Architecture) -> tuple[int, ...]:
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


def pyramid_of(
    raw: RawCheckpoint, arch: Architecture, stages: tuple[int, ...], settings: SourcedSettings, pooled: int = 0
) -> PyramidSizes:
    """Return the sizes of the feature pyramid. pooled: levels by pooling that mmdet's default configuration has."""
    from evm_deploy.model.efficientvmamba.pyramid import PyramidSizes

    inputs = tuple(arch.dims[i] for i in stages)
    channels, convs = _shape(raw, "neck.lateral_convs.0.conv.weight")[0], count_of(raw, "neck.fpn_convs.")
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


def anchors_of(raw: RawCheckpoint, each: int, default: Anchors, head: str, settings: SourcedSettings) -> Anchors:
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

"""Completion of the settings that select detections, from flags, the checkpoint and the target."""

from __future__ import annotations

from dataclasses import replace

from evm_deploy.data.boxes import NMS_MODES, SelectionSettings
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import QUANTIZED, SELECTION, ExportPlan
from evm_deploy.export.target import Target
from evm_deploy.export.targets import load_targets
from evm_deploy.model.network import ModelSpec
from evm_deploy.tasks.detection import DETECTION

LAST_REGION_OPSET = 21


def complete_selection(plan: ExportPlan, spec: ModelSpec, target: Target) -> ExportPlan:
    """Fill in the plan's settings of selection: given values, else the checkpoint's, else mmdet's defaults.

    Raises UsageError for a setting given for a network that is no detector, and for an NMS that the target cannot do.
    """
    given = {name: getattr(plan, name) for name in SELECTION if getattr(plan, name) is not None}
    if spec.task != DETECTION.name:
        if given:
            flag = f"--{next(iter(given)).replace('_', '-')}"
            raise UsageError(f"{flag}: {spec.name} is no detector, it gives {spec.task}", f"leave {flag} out")
        return plan
    if plan.more_imgsz:
        raise UsageError(
            "several --imgsz: the boxes of a detector are clipped to one size", "export once for each size"
        )
    if spec.regions:
        _check_regions(plan, spec, target)
    modes = [mode for mode in NMS_MODES if mode in target.nms]
    if plan.nms not in (None, *modes):
        raise UsageError(
            f"--nms {plan.nms}: target '{target.name}' cannot run it; it has: {', '.join(modes)}",
            "with --nms none the artifact gives candidates, and evm-run selects",
        )
    saved = {name: spec.defaults[name] for name in SELECTION if name in spec.defaults}
    default = SelectionSettings(nms=modes[0])
    found = {name: given.get(name, saved.get(name, getattr(default, name))) for name in SELECTION}
    return replace(plan, **found)


def _check_regions(plan: ExportPlan, spec: ModelSpec, target: Target) -> None:
    """Raise UsageError if the target cannot run a detector of two stages, or the plan asks for its first stage."""
    if not target.regions:
        able = ", ".join(each.name for each in load_targets().values() if each.regions)
        raise UsageError(
            f"target '{target.name}' cannot run {spec.name}: evm-deploy has no RoIAlign for it, which "
            f"{spec.family} needs",
            f"export it for one of: {able}; or export its feature maps with --head features, or a RetinaNet",
        )
    if plan.precision in QUANTIZED:
        raise UsageError(
            f"--precision {plan.precision}: {spec.family} is exported in fp32 and fp16", "use one of these precisions"
        )
    if (plan.opset or 0) > LAST_REGION_OPSET:
        raise UsageError(
            f"--opset {plan.opset}: ONNX Runtime 1.32 does not run RoiAlign of opset 22, which {spec.family} needs",
            f"use --opset {LAST_REGION_OPSET} or lower",
        )
    if plan.nms == "none":
        raise UsageError(
            f"--nms none: {spec.name} has two stages, and the second one needs the NMS of the first in the artifact",
            "leave --nms out",
        )

"""Completion of the settings of a selection in the graph, from flags, the checkpoint and the target."""

from __future__ import annotations

from dataclasses import replace

from evm_deploy.data.boxes import NMS_MODES, SelectionSettings
from evm_deploy.data.preprocessing import CROP, PAD, STRETCH, Preprocessing
from evm_deploy.errors import UsageError
from evm_deploy.export.plan import SELECTION, ExportPlan
from evm_deploy.export.target import Target
from evm_deploy.export.targets import load_targets
from evm_deploy.model.network import ModelSpec
from evm_deploy.tasks import get_task
from evm_deploy.tasks.detection import DETECTION
from evm_deploy.tasks.segmentation import SEGMENTATION

LAST_REGION_OPSET = 21


def complete_selection(plan: ExportPlan, spec: ModelSpec, target: Target) -> ExportPlan:
    """Fill in the plan's settings of selection: given values, else the checkpoint's, else mmdet's defaults.

    Raises UsageError for a setting given for a network that is no detector, for an NMS that the target cannot do, and
    for a plan that a selection in the graph does not support.
    """
    if get_task(spec.task).selects:
        _check_in_graph(plan, spec)
    given = {name: getattr(plan, name) for name in SELECTION if getattr(plan, name) is not None}
    if spec.task != DETECTION.name:
        if given:
            flag = f"--{next(iter(given)).replace('_', '-')}"
            raise UsageError(f"{flag}: {spec.name} is no detector, it gives {spec.task}", f"leave {flag} out")
        return plan
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


def check_whole_image(preprocessing: Preprocessing, spec: ModelSpec) -> None:
    """Raise UsageError for a segmenter that sees a crop: its label map covers the whole image."""
    if spec.task == SEGMENTATION.name and preprocessing.resize == CROP:
        raise UsageError(
            f"--resize {CROP}: a label map covers the whole image, and a crop leaves its border out",
            f"use --resize {PAD}, or {STRETCH}",
        )


def _check_in_graph(plan: ExportPlan, spec: ModelSpec) -> None:
    """Raise UsageError for a plan that a selection in the graph does not support."""
    if plan.more_imgsz:
        networks = "detectors" if spec.task == DETECTION.name else "segmenters"
        raise UsageError(
            f"several --imgsz: the outputs of {networks} are made for one size", "export once for each size"
        )

"""Detector as a Core ML pipeline for Vision and Xcode's preview: the network, then a NonMaximumSuppression model.

Vision makes a VNRecognizedObjectObservation of each row of the outputs `coordinates` and `confidence` of such a
pipeline. Its second stage takes the best class of a row, so that an anchor has one class: not mmdet's pairs of anchor
and class. The first stage is verified here, in the MIL runtime. Nothing was run on Apple hardware. The form of the
pipeline is that of Turi Create's and Ultralytics' detectors.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.silence import silence_libraries
from evm_deploy.data.boxes import MAX_DETECTIONS, SelectionSettings, apart, greedy_nms
from evm_deploy.errors import ParityError, UsageError
from evm_deploy.export.coreml import package
from evm_deploy.export.coreml import program as mlprogram
from evm_deploy.export.coreml.coremltools_patch import converter
from evm_deploy.export.coreml.program import MlProgram
from evm_deploy.export.plan import QUANTIZED, ExportPlan
from evm_deploy.export.selftest import synthetic_image
from evm_deploy.tasks.detection import BOXES, LABELS, SCORES, align
from evm_deploy.tasks.task import Outputs

if TYPE_CHECKING:
    from torch import nn

FILE = "vision.mlpackage"
OUTPUTS = ("coordinates", "confidence")
RAW = ("raw_coordinates", "raw_confidence")  # outputs of the first stage
THRESHOLDS = {
    "iouThreshold": "overlap over which the worse of two boxes of a class is suppressed",
    "confidenceThreshold": "detections have at least this confidence",
}
STAGES = ("network", "suppression")


def check(plan: ExportPlan) -> None:
    """Raise UsageError for a plan that has no pipeline for Vision. Its selection may be incomplete."""
    if plan.input != "image":
        raise UsageError(f"--vision with --input {plan.input}: Vision gives images", "use --input image")
    if plan.precision in QUANTIZED:
        raise UsageError(f"--vision with --precision {plan.precision}: it is for fp16 and fp32", "leave --vision out")


def write(program: MlProgram, plan: ExportPlan, folder: Path) -> dict[str, Any]:
    """Write `folder/vision.mlpackage`, the pipeline of a detector. Returns facts for the manifest.

    Raises UsageError for a network that is no detector with anchors, and ParityError if the first stage gives other
    boxes than the float network.
    """
    settings = plan.selection
    module = best_class_module(program.float_module)
    if settings is None or module is None:
        raise UsageError("--vision is for detectors with anchors, such as RetinaNet", "leave --vision out")
    stage = mlprogram.trace(module, plan, program.model.user_defined_metadata).model
    labels = plan.labels or [f"class {i}" for i in range(module.selection.classes)]
    with silence_libraries():
        package.save(pipeline(stage, settings, labels), folder / FILE)
    verify(stage, module, plan, settings)
    return {
        "file": FILE,
        "outputs": list(OUTPUTS),
        "iou": settings.iou,
        "score_thr": settings.score_thr,
        "selection": "the best class of each anchor, not every pair of anchor and class",
    }


def best_class_module(module: Any) -> Any:
    """Return a copy of a wrapped detector whose outputs are those of `BestClassSelection`; None for other networks."""
    from evm_deploy.model.best_class import BestClassSelection
    from evm_deploy.model.detection import Selection

    own = getattr(module, "selection", None)
    if type(own) is not Selection:
        return None
    selection = BestClassSelection(
        own.anchors, own.classes, own.settings, own.size, before=own.before, min_size=own.min_size
    )
    found: nn.Module = copy.copy(module)  # the network itself is shared
    found._modules = {**module._modules, "selection": selection}
    found.outputs = RAW  # type: ignore[assignment]
    return found.eval()


def pipeline(stage: Any, settings: SelectionSettings, labels: Sequence[str]) -> Any:
    """Return coremltools' MLModel of the pipeline: image (, thresholds) -> coordinates (n, 4), confidence (n, k).

    stage: the MLModel of the network, with outputs RAW. A threshold that is not given has the value in `settings`.
    """
    from coremltools.proto import Model_pb2

    first = stage.get_spec()
    whole, second = Model_pb2.Model(), Model_pb2.Model()
    for model in (whole, second):
        model.specificationVersion = first.specificationVersion
    whole.description.input.add().CopyFrom(first.description.input[0])
    for value in first.description.output:
        second.description.input.add().CopyFrom(value)
    for model in (whole, second):
        for name, meaning in THRESHOLDS.items():
            value = model.description.input.add(name=name, shortDescription=meaning)
            value.type.doubleType.SetInParent()
            value.type.isOptional = True
        for name, columns in zip(OUTPUTS, (4, len(labels)), strict=True):
            _add_rows(model.description.output.add(name=name), columns)
    suppression = second.nonMaximumSuppression
    suppression.coordinatesInputFeatureName, suppression.confidenceInputFeatureName = RAW
    suppression.coordinatesOutputFeatureName, suppression.confidenceOutputFeatureName = OUTPUTS
    suppression.iouThresholdInputFeatureName, suppression.confidenceThresholdInputFeatureName = THRESHOLDS
    suppression.iouThreshold, suppression.confidenceThreshold = settings.iou, settings.score_thr
    suppression.pickTop.perClass = True
    suppression.stringClassLabels.vector.extend(labels)
    whole.description.metadata.CopyFrom(first.description.metadata)
    for name, model in zip(STAGES, (first, second), strict=True):
        whole.pipeline.models.add().CopyFrom(model)
        whole.pipeline.names.append(name)
    return converter().models.MLModel(whole, weights_dir=stage.weights_dir, skip_model_load=True)


def _add_rows(value: Any, columns: int) -> None:
    """Declare an output as any number of rows with `columns` float32 values."""
    array = value.type.multiArrayType
    array.dataType = array.ArrayDataType.Value("FLOAT32")
    for low, high in ((0, -1), (columns, columns)):
        array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)


def suppressed(
    coordinates: NDArray[np.float32], confidence: NDArray[np.float32], iou: float, least: float, size: tuple[int, int]
) -> Outputs:
    """Compute the second stage in numpy: the best class of each row, greedy suppression in each class.

    coordinates (n, 4) centre and size, 0..1; confidence (n, k). size: (H, W) in pixels. Returns boxes (1, m, 4) x1 y1
    x2 y2 in pixels, scores and labels (1, m), by falling score, m at most MAX_DETECTIONS.
    """
    scale = np.array([size[1], size[0]], np.float32)
    centre, half = coordinates[:, :2] * scale, coordinates[:, 2:] * scale / 2
    boxes, labels, scores = np.concatenate([centre - half, centre + half], 1), confidence.argmax(1), confidence.max(1)
    kept = greedy_nms(apart(boxes, labels, float(max(size))), scores, iou, MAX_DETECTIONS, least)
    return {BOXES: boxes[kept][None], SCORES: scores[kept][None], LABELS: labels[kept][None]}


def verify(stage: Any, module: Any, plan: ExportPlan, settings: SelectionSettings) -> None:
    """Compare the first stage in the MIL runtime with the float network, after the same suppression.

    Raises ParityError with the share of boxes that are the same, or the largest difference.
    """
    import torch

    from evm_deploy.runtimes.mil import MilRuntime

    height, width = size = plan.imgsz or (0, 0)
    pixels = synthetic_image(height, width, 0, module.channels)[None]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "stage.mlpackage"
        with silence_libraries():
            package.save(stage, path)
        with MilRuntime(path) as runtime:
            actual = runtime.run({plan.input: pixels})
        expected = dict(zip(RAW, (value.numpy() for value in module(torch.from_numpy(pixels))), strict=True))
    runs = [suppressed(run[RAW[0]], run[RAW[1]], settings.iou, settings.score_thr, size) for run in (expected, actual)]
    ours, theirs, share = align(runs[0], runs[1], plan.tolerance)
    if share < plan.agreement:
        raise ParityError(f"{FILE}: {share:.1%} of its boxes are those of the network, limit {plan.agreement:.1%}")
    for name in (BOXES, SCORES):
        error = float(np.abs(ours[name] - theirs[name]).max(initial=0.0))
        allowed = plan.tolerance * max(1.0, float(np.abs(ours[name]).max(initial=1.0)))
        if not error <= allowed:
            raise ParityError(f"{FILE}: {name} differ by {error:.2g}, limit {allowed:.2g}")

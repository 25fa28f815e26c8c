"""Metadata and an output for OpenVINO Model API, with which its wrapper `SSD` opens a detector's IR as it is.

Read in openvino-model-api 0.4.7: `Model.create_model` reads `rt_info/model_info`; the wrapper takes the outputs
`bboxes` (0..1), `scores` and `labels` of one image, suppresses if `nms_execute` says so, drops boxes up to
`confidence_threshold`, and maps the rest to the image. Its wrapper of segmenters takes no label map: it computes the
argmax over an axis that a label map does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.data.preprocessing import PAD, STRETCH, Preprocessing
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.openvino import MODEL_API_OUTPUTS
from evm_deploy.tasks.detection import BOXES
from evm_deploy.tasks.task import SELECTION

MODEL_INFO = "model_info"  # section of the metadata that Model API reads
NORMALISED = "bboxes"  # name of the output with boxes in 0..1
RESIZES = {PAD: "fit_to_window", STRETCH: "standard"}  # Model API has no crop of a part of the resized image
INTERPOLATIONS = {"bicubic": "CUBIC", "bilinear": "LINEAR", "bilinear-opencv": "LINEAR"}


def add_model_api(model: Any, plan: ExportPlan, facts: Mapping[str, str]) -> dict[str, str]:
    """Add the output `bboxes` and `rt_info/model_info` to a detector's openvino.Model. Returns facts for our runtimes.

    before:  boxes, scores, labels (, count)
    after:   the same; bboxes = Divide(boxes, (W, H, W, H)), which our runtimes do not show

    facts: the metadata of the model, with its preprocessing. A model that Model API cannot run is left as it is, and
    the result is empty: no detector, a crop, or several images in every inference.
    """
    if plan.selection is None or plan.batch.min > 1:
        return {}
    saved: dict[str, Any] = json.loads(facts["preprocessing"])
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    spec = Preprocessing(**values)
    if spec.resize not in RESIZES:
        return {}
    from openvino import opset13

    (boxes,) = (output.get_node().input_value(0) for output in model.outputs if BOXES in output.get_names())
    height, width = spec.size
    sides = opset13.constant(np.array([width, height, width, height], np.float32), name=f"{SELECTION}/sides")
    normalised = opset13.divide(boxes, sides, name=f"{SELECTION}/{NORMALISED}")
    normalised.output(0).get_tensor().set_names({NORMALISED})
    model.add_results([opset13.result(normalised, name=f"{SELECTION}/{NORMALISED}/result")])
    for key, value in model_info(plan.selection, spec, plan).items():
        model.set_rt_info(value, [MODEL_INFO, key])
    return {MODEL_API_OUTPUTS: NORMALISED}


def model_info(selection: SelectionSettings, spec: Preprocessing, plan: ExportPlan) -> dict[str, str]:
    """Return the values of `model_info`, in Model API's spelling.

    Model API's images are BGR, as OpenCV reads them. It separates class names by spaces, so that spaces in a name
    become `_`, and pads all channels with one value: the mean of ours.
    """
    info = {
        "model_type": "SSD",
        "confidence_threshold": f"{selection.score_thr:g}",
        "iou_threshold": f"{selection.iou:g}",
        "nms_execute": str(selection.nms == "none"),
        "nms_max_predictions": str(selection.max_det),
        "agnostic_nms": "False",
        "resize_type": RESIZES[spec.resize],
        "interpolation_mode": INTERPOLATIONS[spec.interpolation],
        "pad_value": str(round(sum(spec.fill) / len(spec.fill))),
        "reverse_input_channels": str(spec.channels == 3),
    }
    if plan.input != "image":  # the graph does not normalise
        info["mean_values"] = " ".join(f"{255 * mean:.7g}" for mean in spec.mean)
        info["scale_values"] = " ".join(f"{255 * std:.7g}" for std in spec.std)
    if plan.labels:
        info["labels"] = " ".join("_".join(label.split()) or "_" for label in plan.labels)
    return info

"""Target `litert`: a TFLite file of standard operators, written from the hub graph without a converter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.packages import install_hint
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import UsageError
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.graph import Graph, scan_sites
from evm_deploy.export.hub.tools import check_fp16_range
from evm_deploy.export.hub.unroll import static, unroll, unrolled_alone
from evm_deploy.export.litert import layers, metadata, moves, operators, products, rounding, selection
from evm_deploy.export.litert.readme import usage
from evm_deploy.export.litert.scans import LiteRtArtifact, LiteRtScanAccess
from evm_deploy.export.litert.translate import Translation
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, Target, quantize_hub
from evm_deploy.runtimes.litert import INFO, MODULE

if TYPE_CHECKING:
    import onnx

ARTIFACT = "model.tflite"
FACTS = "evm_deploy"  # metadata of the file that hold ours, as JSON
RULES = {
    **operators.RULES,
    **moves.RULES,
    **layers.RULES,
    **products.RULES,
    **rounding.RULES,
    **selection.RULES,
}
#: Versions of kernels that the rules use, where it is not 1.
VERSIONS = {
    "BROADCAST_TO": 2,
    "FULLY_CONNECTED": 5,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "TRANSPOSE_CONV": 3,
}
SCAN = Decision("portable", "standard operators without loops")


def check_plan(plan: ExportPlan) -> None:
    """Raise UsageError for a batch that is not fixed: the file has static shapes."""
    if not plan.batch.static:
        raise UsageError(f"a LiteRT file has static shapes, and --batch {plan.batch} is not", "use --batch N")


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.tflite`: the hub graph in the plan's precision, with metadata and labels.

    Raises UsageError for a graph that has no loop-free form, for operators that have no translation, and for weights
    that float16 cannot hold.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    fold_normalisation(model)
    sites = scan_sites(model)
    half = plan.precision == "fp16"
    if half:
        check_fp16_range(model, sites)
    unroll(model)
    found = translated(model, half=half)
    facts = {entry.key: entry.value for entry in graph.model.metadata_props if not entry.key.startswith("onnxsim.")}
    labels = plan.labels if set(found.outputs) & set(metadata.LABELLED) else None
    inputs = {name: found.shapes[name] for name in found.inputs}
    further = {
        metadata.METADATA: metadata.model_metadata(facts, inputs, list(found.outputs), labels=bool(labels)),
        FACTS: json.dumps(facts, sort_keys=True).encode(),
    }
    data = found.file.finish(found.inputs, found.outputs, "evm-deploy", further)
    path = folder / ARTIFACT
    path.write_bytes(metadata.with_labels(data, labels) if labels else data)
    outputs = {node.name: node.output[0] for node in model.graph.node if node.op_type == "Conv"}
    details = {"operators": found.file.count, "scans": sites}
    return LiteRtArtifact(path, SCAN, details, values=found.values, layers=outputs)


def translated(model: onnx.ModelProto, *, half: bool = False) -> Translation:
    """Translate a graph whose scans are unrolled. half: store weights as float16. Changes `model`."""
    return Translation(static(model), RULES, VERSIONS, half=half)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write a file of one scan of this shape, with all seven tensors as inputs."""
    found = translated(unrolled_alone(graph.model, shape.L, shape))
    path.write_bytes(found.file.finish(found.inputs, found.outputs, "evm-deploy", {}))


TARGET = Target(
    runtime=INFO,
    scans=("auto", "portable"),
    packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", MODULE),
    install_hint=install_hint("litert"),
    build=build,
    scan_access=LiteRtScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    # LiteRT's int8 layers give int8 alone; XNNPACK's products do not saturate
    quantize=partial(quantize_hub, rounded_outputs=True, saturates=False),
    check=check_plan,
    nms=("none",),
)

"""Target `onnx`: one file that runs in a stock ONNX Runtime, and in any runtime that supports ONNX functions."""

from __future__ import annotations

from pathlib import Path

from evm_deploy._util.onnx import inlined
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import UsageError
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.fuse import fuse_module
from evm_deploy.export.hub.graph import INSTALL_HINT, Graph, check, scan_alone, scan_sites
from evm_deploy.export.hub.scans import OnnxScanAccess
from evm_deploy.export.hub.tools import to_fp16
from evm_deploy.export.hub.unroll import static, unroll, unrolled_alone
from evm_deploy.export.onnx.readme import usage
from evm_deploy.export.plan import DEFAULT_OPSET, WEIGHT_BITS, ExportPlan
from evm_deploy.export.selftest import STEPS
from evm_deploy.export.target import Artifact, Libraries, Target
from evm_deploy.runtimes.onnxruntime import INFO
from evm_deploy.toolchain import cross_compile
from evm_deploy.toolchain.platforms import PLATFORMS

UNROLLED = Decision("portable", "unrolled, as asked: standard ops without loops, functions or nodes of domain evm")


def check_plan(plan: ExportPlan) -> None:
    """Raise UsageError for unrolled scans with a batch that is not fixed: their shapes are static."""
    if plan.scan == "unrolled" and not plan.batch.static:
        raise UsageError(
            f"--scan unrolled has static shapes, and --batch {plan.batch} is not one number of images",
            "use --batch N, or --scan portable",
        )


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.onnx`: the hub graph in the plan's precision and scan lowering.

    With scan `auto`, each block is one node. In float16 only each scan is one node, which stays float32 between casts.
    Raises UsageError for scan `unrolled` if the graph has control flow or a shape that depends on the image.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    fold_normalisation(model)
    if plan.precision == "fp16":
        model = to_fp16(model, scan_sites(model))
    sites = scan_sites(model)
    if plan.scan == "portable":
        model = inlined(model)
        scan = Decision("portable", "as asked, standard ops only: no function, no node of domain evm")
    elif plan.scan == "unrolled":
        unroll(model)
        model = static(model)
        scan = UNROLLED
    else:
        if fuses(plan):
            for module, op in graph.fusable.items():
                fuse_module(model, module, op)
            sites = scan_sites(model, graph.fusable)
        scan = Decision(
            "plugin+portable", "one file: evm nodes for the native kernel, portable body where it is not registered"
        )
    check(model)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    details = {
        "opset": plan.opset or DEFAULT_OPSET,
        "ir_version": model.ir_version,
        "nodes": len(model.graph.node),
        "scans": sites,
    }
    return Artifact(path, scan, details)


def fuses(plan: ExportPlan) -> bool:
    """Return whether blocks become one node each: with scan `auto`, in all precisions but float16."""
    return plan.scan == "auto" and plan.precision != "fp16"


def build_plugin(platform: str) -> Path:
    """Compile ONNX Runtime's native library for `platform`. Returns the library's path. Raises ToolchainError."""
    return cross_compile.library("onnxruntime", platform)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write a model of one scan, lowered as in the artifact, with all seven tensors as inputs of any size."""
    if artifact.scan == UNROLLED:
        model = unrolled_alone(graph.model, STEPS)
    else:
        model = scan_alone(graph.model)
        if artifact.scan.value == "portable":
            model = inlined(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


TARGET = Target(
    runtime=INFO,
    scans=("auto", "portable", "unrolled"),
    packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime"),
    install_hint=INSTALL_HINT,
    build=build,
    fuses=fuses,
    scan_access=OnnxScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    check=check_plan,
    regions=True,
    weight_bits=WEIGHT_BITS,
    libraries=Libraries(tuple(PLATFORMS), build_plugin),
)

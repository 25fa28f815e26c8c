"""Target `onnx`: one file that runs on a stock ONNX Runtime, and anywhere that knows ONNX functions."""

from __future__ import annotations

from pathlib import Path

from evm_deploy._util.packages import package_versions
from evm_deploy.bundle.manifest import Choice
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.fuse import outline
from evm_deploy.export.hub.graph import INSTALL_HINT, Graph, check, scan_alone, scan_sites
from evm_deploy.export.hub.tools import to_fp16
from evm_deploy.export.onnx.readme import usage
from evm_deploy.export.onnx.scans import OnnxScanTaps
from evm_deploy.export.plan import DEFAULT_OPSET, ExportPlan
from evm_deploy.export.target import Artifact, Probe, Target
from evm_deploy.runtimes.base import RunOptions, Runtime
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.toolchain import cross
from evm_deploy.toolchain.platforms import PLATFORMS
from evm_deploy.toolchain.plugins import HINT, find_plugin, kernel_isa, not_built

BUILD_PACKAGES = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")


def probe() -> Probe:
    """Which of the packages are here, without importing them."""
    versions = package_versions(BUILD_PACKAGES)
    missing = [name for name in BUILD_PACKAGES if name not in versions]
    return Probe(not missing, "onnxruntime" in versions, versions, INSTALL_HINT if missing else "")


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.onnx`: the hub graph in the plan's precision and scan lowering.

    With `auto` whole blocks are nodes; in float16 only the scans, which stay float32 between casts.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    fold_normalisation(model)
    if plan.precision == "fp16":
        model = to_fp16(model, scan_sites(model))
    sites = scan_sites(model)
    if plan.scan == "portable":
        model = onnx.inliner.inline_local_functions(model)
        scan = Choice("portable", "as asked, standard ops only: no function, no node of domain evm")
    else:
        if plan.precision != "fp16":
            for module, op in graph.fusable.items():
                outline(model, module, op)
            sites = scan_sites(model, graph.fusable)
        scan = Choice(
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


def open_(path: Path, options: RunOptions) -> Runtime:
    if options.device not in (None, "CPU"):
        raise UsageError(f"device {options.device!r}: ONNX Runtime's CPU provider is the only one that is used")
    if options.cache:
        raise UsageError("ONNX Runtime keeps no compiled models", "leave the cache out")
    return OnnxRuntime(path, options.threads, options.plugin, options.profile)


def plugin() -> Path:
    path = find_plugin("onnxruntime")
    if path is None:
        raise ToolchainError(not_built(), HINT)
    return path


def build_plugin(platform: str) -> Path:
    return cross.library("onnxruntime", platform)


def write_scan_probe(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write one scan with all seven tensors as inputs and any shape, lowered as in the artifact."""
    import onnx

    model = scan_alone(graph.model)
    if artifact.scan.value == "portable":
        model = onnx.inliner.inline_local_functions(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


TARGET = Target(
    name="onnx",
    aliases=("ort", "onnxruntime"),
    precisions=("fp32", "fp16", "int8", "w8"),
    scans=("auto", "portable"),
    devices=tuple(PLATFORMS),
    probe=probe,
    build=build,
    taps=OnnxScanTaps,
    open=open_,
    plugin=plugin,
    isa=kernel_isa,
    build_plugin=build_plugin,
    scan_probe="scan.onnx",
    write_scan_probe=write_scan_probe,
    usage=usage,
    streams=True,
    profiles=True,
)

"""Target `executorch`: a program (.pte) for ExecuTorch, with the delegate XNNPACK and our operators or without them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from evm_deploy._util.packages import install_hint
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import UsageError
from evm_deploy.export.executorch.graph import widen_convolutions
from evm_deploy.export.executorch.program import lower
from evm_deploy.export.executorch.quantized import prepare
from evm_deploy.export.executorch.readme import usage
from evm_deploy.export.executorch.scans import ExecuTorchArtifact, ExecuTorchScanAccess, scan_program
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.fuse import fuse_module
from evm_deploy.export.hub.graph import Graph, scan_sites
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, Target, quantize_hub
from evm_deploy.runtimes.executorch import INFO
from evm_deploy.toolchain.executorch_library import installed_release, library
from evm_deploy.toolchain.platforms import host_platform

ARTIFACT = "model.pte"


def check_plan(plan: ExportPlan) -> None:
    """Raise UsageError for a batch that is not fixed: a program has fixed sizes."""
    if not plan.batch.static:
        raise UsageError(f"a program of ExecuTorch has fixed sizes, and --batch {plan.batch} is not", "use --batch N")


def fuses(plan: ExportPlan) -> bool:
    """Return whether blocks become operators of our library."""
    return plan.scan != "portable"


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.pte`: the hub graph, with each block as one operator, or with standard operators only.

    Our library for this platform is copied into the bundle, under `plugins`, if the program needs its operators.
    Raises UsageError naming a node that has no form in ExecuTorch, ToolchainError if ExecuTorch fails or the library
    cannot be compiled.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    fold_normalisation(model)
    widen_convolutions(model)
    plugins = {}
    if not fuses(plan):
        scan = Decision("portable", "as asked, standard operators only: any build of ExecuTorch with XNNPACK runs them")
        sites = scan_sites(model)
    else:
        scan = Decision("plugin", "blocks and scans as operators of our library, which an app links or loads")
        for module, op in graph.fusable.items():
            fuse_module(model, module, op)
        sites = scan_sites(model, graph.fusable)
        inside = f"plugins/{host_platform()}/{(source := library()).name}"
        (folder / inside).parent.mkdir(parents=True)
        shutil.copyfile(source, folder / inside)
        plugins[host_platform()] = inside
    if plan.precision == "int8":
        prepare(model)
    program = lower(model, portable=not fuses(plan))
    path = folder / ARTIFACT
    path.write_bytes(program.file)
    details = {
        "executorch": installed_release(),
        "delegates": program.delegates,
        "operators": program.operators,
        "scans": sites,
    }
    return ExecuTorchArtifact(path, scan, details, plugins, graph=model, order=program.scans)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write the program of one scan of this shape, lowered as in the artifact, with all seven tensors as inputs."""
    assert isinstance(artifact, ExecuTorchArtifact)
    path.write_bytes(scan_program(graph.model, {"b": 1, **shape._asdict()}, portable=artifact.portable))


TARGET = Target(
    runtime=INFO,
    scans=("auto", "plugin", "portable"),
    packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "executorch"),
    install_hint=install_hint("executorch"),
    build=build,
    fuses=fuses,
    scan_access=ExecuTorchScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    quantize=partial(quantize_hub, saturates=False),  # XNNPACK and our blocks sum exactly
    check=check_plan,
    nms=("none",),
)

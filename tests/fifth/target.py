"""The build half of target `fifth`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy._util.packages import install_hint
from evm_deploy._util.settings import setting, whole
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import Usage
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.export import onnx
from evm_deploy.export.hub.graph import Graph
from evm_deploy.export.hub.scans import OnnxScanAccess
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, Target
from tests.fifth.runtime import INFO


@dataclass(frozen=True)
class FifthBuild:
    """wheels: how many it has."""

    wheels: int = setting(4, "--wheels", metavar="N", read=whole, help="Fifth: wheels, default 4")


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """The portable ONNX file as `model.fifth`."""
    artifact = onnx.build(graph, replace(plan, scan="portable"), folder)
    details = {**artifact.details, "wheels": plan.settings.wheels}
    return replace(artifact, path=artifact.path.rename(folder / "model.fifth"), details=details)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    beside = path.with_suffix(".onnx")
    onnx.write_scan_case(graph, artifact, beside, shape)
    shutil.move(beside, path)


def usage(manifest: Manifest) -> Usage:
    return Usage("the model", "", f"## Python\n\n    fifth.run('{manifest.artifact}')\n")


TARGET = Target(
    runtime=INFO,
    scans=("auto", "portable"),
    packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime"),
    install_hint=install_hint("onnx"),
    build=build,
    scan_access=OnnxScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    settings=FifthBuild,
)

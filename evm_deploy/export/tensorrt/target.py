"""Targets `trt` and `trt-rtx`: an ONNX file for TensorRT, verified in ONNX Runtime, and the engine built from the file.

An engine is built on the machine that runs it. `build_engine` adds the engine to a bundle exported without TensorRT.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from evm_deploy._util import processes
from evm_deploy._util.files import copy_folder
from evm_deploy._util.onnx import inlined
from evm_deploy.bundle.manifest import Decision, Manifest
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.data.boxes import NMS_MODES
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export.hub.graph import INSTALL_HINT, Graph, scan_alone
from evm_deploy.export.hub.scans import OnnxScanAccess
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.target import Artifact, Emulator, EngineBuild, Target, quantize_hub
from evm_deploy.export.tensorrt.graph import tensorrt_graph
from evm_deploy.export.tensorrt.readme import usage
from evm_deploy.export.tensorrt.settings import EngineSettings
from evm_deploy.export.tensorrt.suppression import emulate
from evm_deploy.runtimes import tensorrt
from evm_deploy.runtimes.base import RunOptions, Runtime
from evm_deploy.runtimes.info import RuntimeInfo
from evm_deploy.runtimes.tensorrt import INSTALL_HINTS, can_build_engine, emulator, installed, kernel
from evm_deploy.runtimes.tensorrt import build_engine as engine_builder
from evm_deploy.toolchain.plugins import installed_plugin

INVALID = 2  # exit code of the builder for an invalid bundle
SCANS = {
    "portable": "standard ops only: any TensorRT from 10.0 on, and TensorRT-RTX",
    "aot": "the kernel is embedded in the engine: TensorRT from 10.9 on",
    "plugin": "the kernel is in a library beside the engine: TensorRT from 10.0 on",
}


def check(target: str, plan: ExportPlan) -> None:
    """Raise UsageError for a plan that TensorRT or its builder does not support.

    With --no-defer, raise ToolchainError if this machine cannot build the engine.
    """
    engine: EngineSettings = plan.settings
    if not plan.batch.static and plan.batch.max is None:
        raise UsageError("TensorRT needs a range for a dynamic batch", "use --batch MIN:OPT:MAX, such as 1:4:8")
    if target == "trt" and engine.sms:
        raise UsageError("--sm is for trt-rtx: TensorRT builds for the GPU of this machine", "leave --sm out")
    if target == "trt-rtx":
        for flag, given in (
            ("--version-compatible", engine.version_compatible),
            ("--hardware-compatible", engine.hardware_compatible),
            ("--efficient-nms", engine.efficient_nms),
        ):
            if given:
                raise UsageError(f"TensorRT-RTX has no {flag}", f"leave {flag} out")
    if engine.efficient_nms and plan.nms == "none":
        raise UsageError("--efficient-nms with --nms none: there is no NMS in the graph", "leave one of the two out")
    if not engine.defer and not can_build_engine(target):
        why = "there is no NVIDIA driver here" if installed(target) else "it is not installed"
        raise ToolchainError(
            f"{engine_builder.MODULES[target][0]} cannot build the engine that --no-defer asks for: {why}",
            INSTALL_HINTS[target],
        )


def build(target: str, graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder`/model.onnx, and the files that build the engine from it: build.json and finish.py."""
    model, sites = tensorrt_graph(graph.model, plan)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    mode = "portable" if plan.scan == "auto" else plan.scan
    batch, image = plan.batch, [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    profile = None if batch.static else [[n or 1, *image] for n in (batch.min, batch.opt, batch.max)]
    settings = {"target": target, "scan": mode, "profile": profile, **asdict(plan.settings)}
    del settings["defer"], settings["efficient_nms"]  # decided here, not by the builder
    (folder / "build.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(engine_builder.__file__, folder / "finish.py")
    if mode == "plugin":
        copy_folder(kernel.source().parent, folder / "plugin")
    details = {"opset": model.opset_import[0].version, "nodes": len(model.graph.node), "scans": sites}
    return Artifact(path, Decision(mode, SCANS[mode]), details)


def build_engine(target: str, folder: Path, library: str | None = None, timing_cache: str | None = None) -> None:
    """Build the engine of the bundle in `folder`, in a separate process, because some inputs crash the builder.

    library: path of the plugin's library. timing_cache: file that is read and updated. Raises BundleError for a bundle
    whose build.json is invalid, ToolchainError with the builder's message.
    """
    given = {"--library": library, "--timing-cache": timing_cache}
    flags = [f"{flag}={path}" for flag, path in given.items() if path]
    done = processes.run([sys.executable, engine_builder.__file__, *flags, "--", str(folder)])
    if done.returncode < 0:
        raise ToolchainError(f"the builder of {target} was ended by signal {-done.returncode}", done.stderr[-500:])
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("finish: ")
        if done.returncode == INVALID:
            raise BundleError(said, "export the bundle again")
        raise ToolchainError(said, "the bundle is left without its engine")


class TensorRtScanAccess(OnnxScanAccess):
    """Per-scan access to TensorRT's ONNX file in ONNX Runtime, which computes the NMS plugin as a function."""

    def __init__(self, artifact: Artifact, plugin: Path | None) -> None:
        super().__init__(artifact, plugin)
        emulate(self.model)


def open_emulator(path: Path, options: RunOptions) -> Runtime:
    """Open the ONNX file of a bundle in ONNX Runtime, which computes the NMS plugin as a function."""
    import onnx

    model = onnx.load(str(path))
    return emulator(model.SerializeToString() if emulate(model) else path, options)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write a model of one scan in the hub's portable form, with all seven tensors as inputs of any size."""
    model = inlined(scan_alone(graph.model))
    path.write_bytes(model.SerializeToString(deterministic=True))


def summary(manifest: Manifest) -> list[tuple[str, str]]:
    """Return the line about the engine for evm-export: the builder's version and GPU, or that the engine is missing."""
    if not manifest.built:
        return [("Engine", "not built here")]
    facts = manifest.details["engine"]
    where = facts["gpu"]["name"] or ", ".join(f"sm_{sm}" for sm in facts["sms"]) or "no GPU here: default architectures"
    return [("Engine", f"TensorRT {facts['tensorrt']}, {where}, {facts['layers']} layers")]


def _target(info: RuntimeInfo, scans: tuple[str, ...], nms: tuple[str, ...] = NMS_MODES) -> Target:
    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(function, info.name)

    return Target(
        runtime=info,
        scans=scans,
        packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime"),
        install_hint=INSTALL_HINT,
        build=bound(build),
        scan_access=TensorRtScanAccess,
        write_scan_case=write_scan_case,
        usage=usage,
        quantize=partial(quantize_hub, symmetric=True),  # TensorRT refuses zero points
        check=bound(check),
        nms=nms,
        emulator=Emulator(open_emulator, library=installed_plugin),
        engine=EngineBuild(bound(build_engine), partial(can_build_engine, info.name), summary),
        settings=EngineSettings,
    )


TRT = _target(tensorrt.TRT, ("auto", "portable", "aot", "plugin"))
# TensorRT-RTX 1.7.1 parses NonMaxSuppression, but builds no engine of it: "no runners that implement it"
TRT_RTX = _target(tensorrt.TRT_RTX, ("auto", "portable"), nms=("none",))

"""Target `qnn`: a context binary for the NPU of one Qualcomm SoC, compiled and verified without the device."""

from __future__ import annotations

from pathlib import Path

from evm_deploy._util.packages import install_hint
from evm_deploy.bundle.manifest import Decision, Manifest
from evm_deploy.bundle.readme import Usage, example_pixels
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import UsageError
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.graph import Graph, check, scan_sites
from evm_deploy.export.hub.tools import check_fp16_range
from evm_deploy.export.hub.unroll import static, unroll, unrolled_alone
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.qnn.context import QnnArtifact, QnnScanAccess, compile_context
from evm_deploy.export.qnn.graph import cast_by_int32, floor_exponents, steps_per_chunk
from evm_deploy.export.qnn.settings import QnnSettings
from evm_deploy.export.target import Artifact, Target
from evm_deploy.runtimes.base import Runtime
from evm_deploy.runtimes.qnn import INFO, MODULE

# The NPU computes scans in float16, too: ten times the largest error of the digits' scans, in place and on large deltas
SCAN_TOLERANCE = 0.1


def check_plan(plan: ExportPlan) -> None:
    """Raise UsageError for a batch that is not fixed: a context binary has static shapes."""
    if not plan.batch.static:
        raise UsageError(f"a context binary has static shapes, and --batch {plan.batch} is not", "use --batch N")


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.onnx`: one EPContext node that holds the compiled network.

    Raises UsageError for weights that float16 cannot hold, and for a graph that has no loop-free form or nodes that the
    NPU does not take; ToolchainError if QNN fails.
    """
    import onnx

    settings: QnnSettings = plan.settings
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    fold_normalisation(model)
    sites = scan_sites(model)
    check_fp16_range(model, sites)
    unroll(model, steps_per_chunk)
    cast_by_int32(model)
    floor_exponents(model)
    model = static(model)
    check(model)
    path = folder / "model.onnx"
    compile_context(model, path, settings)
    details = {
        "soc": settings.soc,
        "soc_name": settings.name,
        "htp_arch": settings.architecture,
        "nodes": len(model.graph.node),
        "opset": model.opset_import[0].version,
        "scans": sites,
    }
    scan = Decision("portable", f"standard ops without loops, inside the context binary for {settings.name}")
    return QnnArtifact(path, scan, details, graph=model, settings=settings)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write the context binary of one scan of this shape, with all seven tensors as inputs."""
    assert isinstance(artifact, QnnArtifact) and artifact.settings is not None
    model = unrolled_alone(graph.model, shape.L, shape, steps_per_chunk(shape.K, shape.L))
    floor_exponents(model)
    compile_context(model, path, artifact.settings)


def remarks(runtime: Runtime) -> list[str]:
    """Return the note on the emulator, if the runtime is one."""
    return ["verified on QNN's emulator of the NPU; no device has run it"] if getattr(runtime, "emulates", "") else []


def usage(manifest: Manifest) -> Usage:
    """Return the texts for ONNX Runtime with the QNN plugin, in Python."""
    read = manifest.inputs[0]
    soc = manifest.details["soc_name"]
    return Usage(
        artifact=f"the context binary for {soc}, an ONNX file of one EPContext node",
        library="",
        sections=f"""With ONNX Runtime and the QNN plugin, on a device with {soc}:

```python
import numpy as np
import onnxruntime as ort
import onnxruntime_qnn as qnn

ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
devices = [device for device in ort.get_ep_devices() if device.ep_name == qnn.get_ep_name()]
options = ort.SessionOptions()
options.add_provider_for_devices(devices[:1], {{"backend_path": qnn.get_qnn_htp_path()}})
session = ort.InferenceSession("{manifest.artifact}", options)
pixels = {example_pixels(read)}  # your image
outputs = session.run(None, {{"{read["name"]}": pixels}})
```

Qualcomm's libraries come with the package `onnxruntime-qnn`, under Qualcomm's licence. They are not in this bundle.
""",
    )


TARGET = Target(
    runtime=INFO,
    scans=("auto", "portable"),
    packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", MODULE),
    install_hint=install_hint("qnn"),
    build=build,
    scan_access=QnnScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    check=check_plan,
    nms=("none",),
    float16=("fp16",),
    scan_tolerance=SCAN_TOLERANCE,
    remarks=remarks,
    settings=QnnSettings,
)

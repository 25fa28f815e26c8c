"""Target `openvino`: an IR with the blocks as operators of our extension, or with standard operators only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy._util.onnx import inlined
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.hub.fuse import fuse_module
from evm_deploy.export.hub.graph import Graph, ScanSite, scan_alone, scan_sites
from evm_deploy.export.hub.tools import check_fp16_range
from evm_deploy.export.openvino.ir import convert, describe, halve_weights, save
from evm_deploy.export.openvino.model_api import add_model_api
from evm_deploy.export.openvino.readme import usage
from evm_deploy.export.openvino.scans import OpenVinoScanAccess
from evm_deploy.export.openvino.settings import HALF_KERNELS, OpenVinoExportSettings
from evm_deploy.export.plan import WEIGHT_BITS, ExportPlan
from evm_deploy.export.target import Artifact, Target
from evm_deploy.runtimes.base import Runtime
from evm_deploy.runtimes.openvino import INFO, PRECISION_HINT, OpenVinoRuntime, open_core
from evm_deploy.scan import onnx_function
from evm_deploy.toolchain import openvino_extension
from evm_deploy.toolchain.openvino_extension import INSTALL_HINT, extension
from evm_deploy.toolchain.platforms import host_platform

if TYPE_CHECKING:
    import onnx

BLOCK_STEPS = 28  # per iteration of a portable scan: the whole model is 6 % faster than with 7 steps


def halves_blocks(plan: ExportPlan) -> bool:
    """Return whether --half-blocks is asked for."""
    return isinstance(plan.settings, OpenVinoExportSettings) and plan.settings.half_blocks


def check_plan(plan: ExportPlan) -> None:
    """Raise UsageError for --half-blocks without --fp16, or with portable scans."""
    if halves_blocks(plan) and (plan.precision != "fp16" or plan.scan == "portable"):
        raise UsageError("--half-blocks is for blocks on the native kernel in float16", "add --fp16 --scan plugin")


def build(graph: Graph, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.xml` and `model.bin`: the hub graph in the plan's precision and scan lowering.

    The extension, if the blocks need it, is copied into the bundle, under `plugins`. The model does not load without
    its extension. Raises ToolchainError if --half-blocks cannot be verified on this CPU, UsageError if the network has
    no block for it.
    """
    scan, library = choose_lowering(plan)
    proto, sites = lowered(graph, scan.value)
    if plan.precision == "fp16":
        check_fp16_range(proto, sites)
    half = half_precision(library) if halves_blocks(plan) else None
    if half and not halve_products(proto, graph, half):
        raise UsageError("--half-blocks: the native kernel has no block of this network", "leave --half-blocks out")
    core = open_core(library)
    model = convert(core, proto)
    if plan.precision == "fp16":
        halve_weights(model, sites)
    hint = precision_hint(plan, scan)
    facts = {entry.key: entry.value for entry in graph.model.metadata_props if not entry.key.startswith("onnxsim.")}
    describe(model, {**facts, **add_model_api(model, plan, facts), PRECISION_HINT: hint, "scan": scan.value})
    save(model, folder / "model.xml")
    plugins = {}
    if library:
        inside = f"plugins/{host_platform()}/{library.name}"
        (folder / inside).parent.mkdir(parents=True)
        shutil.copyfile(library, folder / inside)
        plugins[host_platform()] = inside
    details = {PRECISION_HINT: hint, "operations": len(model.get_ops()), "scans": sites}
    details |= {"half_blocks": half} if half else {}
    return Artifact(folder / "model.xml", scan, details, plugins)


def choose_lowering(plan: ExportPlan) -> tuple[Decision, Path | None]:
    """Choose how the scans run. Returns the choice, and the extension or None.

    Raises ToolchainError if --scan plugin asks for the extension and there is none.
    """
    if plan.scan == "portable":
        return Decision("portable", "as asked, standard operators only"), None
    try:
        library = extension()
    except ToolchainError as error:
        if plan.scan == "plugin":
            raise
        return Decision("portable", f"standard operators only: {error.args[0]}"), None
    release = openvino_extension.release_of(library)
    return Decision("plugin", f"blocks as operators of the extension in plugins/, for OpenVINO {release}"), library


def fuses(plan: ExportPlan) -> bool:
    """Return whether blocks become operators of the extension. Raises as `choose_lowering`."""
    return choose_lowering(plan)[0].value == "plugin"


def precision_hint(plan: ExportPlan, scan: Decision) -> str:
    """Return OpenVINO's precision hint: `f16` for float16 exports with the extension, else `f32`.

    With `f16` a device computes in the half precision that it has, f16 or bf16. Portable scans need `f32`, because
    OpenVINO would round their states too.
    """
    return "f16" if plan.precision == "fp16" and scan.value == "plugin" else "f32"


def lowered(graph: Graph, scan: str) -> tuple[onnx.ModelProto, tuple[ScanSite, ...]]:
    """Return the hub graph with blocks as nodes (`plugin`) or every function inlined (`portable`), and its scans."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(graph.model)
    if scan == "portable":
        return unrolled(proto), scan_sites(proto)
    for module, op in graph.fusable.items():
        fuse_module(proto, module, op)
    return proto, scan_sites(proto, graph.fusable)


def half_precision(library: Path | None) -> str:
    """Return the half precision in which the extension's kernel multiplies on this CPU. Raises ToolchainError."""
    kernel = openvino_extension.isa(library) if library else "none"
    if kernel not in HALF_KERNELS:
        raise ToolchainError(
            f"--half-blocks cannot be verified here: the kernel is {kernel}, not {' or '.join(HALF_KERNELS)}",
            "leave --half-blocks out, or export on a CPU with AVX512_BF16, or on an Arm CPU with FP16 arithmetic",
        )
    return HALF_KERNELS[kernel]


def halve_products(proto: onnx.ModelProto, graph: Graph, half: str) -> int:
    """Let blocks that are one node multiply in the half precision of the CPU, in place. Return the number of blocks.

    before:  %1 = evm::EVSSBlock(%0, ..)
    after:   %1 = evm::EVSSBlock<half="bfloat16">(%0, ..)
    """
    import onnx

    types = {op.op_type for op in graph.fusable.values()}
    blocks = [node for node in proto.graph.node if node.domain == onnx_function.DOMAIN and node.op_type in types]
    for node in blocks:
        node.attribute.append(onnx.helper.make_attribute("half", half))
    return len(blocks)


def unrolled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Inline a graph's functions, with scans unrolled over BLOCK_STEPS steps per iteration. Changes `proto`."""
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    for function in proto.functions:
        if function.name == onnx_function.OP_TYPE:
            softplus = onnx_function.SOFTPLUS not in function.attribute
            longer = onnx_function.selective_scan_function(opset, BLOCK_STEPS, softplus=softplus)
            longer.overload = function.overload
            function.CopyFrom(longer)
    return inlined(proto)


def write_scan_case(graph: Graph, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write a model of one scan, lowered as in the artifact, with all seven tensors as inputs of any size."""
    proto, library = scan_alone(graph.model), None
    if artifact.scan.value == "portable":
        proto = unrolled(proto)
    else:
        library = artifact.path.parent / artifact.plugins[host_platform()]
    core = open_core(library)
    save(convert(core, proto), path)


def remarks(runtime: Runtime) -> list[str]:
    """Return a note if this CPU computes in float16: with AVX512-FP16 but no AMX, float16 is slower than float32."""
    if isinstance(runtime, OpenVinoRuntime) and runtime.precision == "f16":
        return ["OpenVINO computes this model in float16 on this CPU; float32 may be faster: compare with evm-bench"]
    return []


TARGET = Target(
    runtime=INFO,
    scans=("auto", "plugin", "portable"),
    packages=("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "openvino"),
    install_hint=INSTALL_HINT,
    build=build,
    fuses=fuses,
    scan_access=OpenVinoScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    check=check_plan,
    settings=OpenVinoExportSettings,
    regions=True,
    weight_bits=WEIGHT_BITS,
    remarks=remarks,
)

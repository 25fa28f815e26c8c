"""Target `coreml`: an mlprogram package for iOS and macOS, verified on any system in the MIL runtime."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from evm_deploy._util.progress import Step
from evm_deploy._util.text import size_text
from evm_deploy.bundle.manifest import Decision
from evm_deploy.bundle.selftest import ScanShape
from evm_deploy.calib.config import QuantizationConfig
from evm_deploy.calib.evaluation import OpenCandidate
from evm_deploy.calib.int8 import Quantized
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import UsageError
from evm_deploy.export.coreml import package, vision
from evm_deploy.export.coreml import program as mlprogram
from evm_deploy.export.coreml.int8 import quantize_program
from evm_deploy.export.coreml.program import DEFAULT_MIN_TARGET, MlProgram
from evm_deploy.export.coreml.readme import usage
from evm_deploy.export.coreml.scans import CoreMlScanAccess, scan_site
from evm_deploy.export.coreml.settings import CoreMlSettings
from evm_deploy.export.coreml.static_cost import static_cost
from evm_deploy.export.hub import float16
from evm_deploy.export.plan import MIN_TARGETS, QUANTIZED, SELFTEST_TOLERANCES, TOLERANCES, ExportPlan
from evm_deploy.export.target import Artifact, Emulator, Target
from evm_deploy.runtimes.base import Runtime
from evm_deploy.runtimes.coreml import INFO, emulator
from evm_deploy.runtimes.coreml.tools import INSTALL_HINT
from evm_deploy.scan.fused import fusable_modules

ARTIFACT = "model.mlpackage"
SCRIPTS = ("bench/bench_on_mac.py", "bench/latency.py", "runtimes/coreml/compute_plan.py")  # run without evm-deploy


def check(plan: ExportPlan) -> None:
    """Raise UsageError for a plan that Core ML does not support."""
    if not plan.batch.static:
        raise UsageError(f"--batch {plan.batch}: a Core ML program has one batch size", "use --batch with one number")
    if plan.input == "image" and plan.batch.min > 1:
        raise UsageError(
            f"--batch {plan.batch}: an image input of Core ML takes one image",
            "use --input tensor, or MLBatchProvider in the app",
        )
    if isinstance(plan.settings, CoreMlSettings) and plan.settings.vision:
        vision.check(plan)
    if plan.smooth == "on":
        raise UsageError("--smooth on: Core ML programs are quantised without smoothing", "leave --smooth out")
    if plan.opset:
        raise UsageError(f"--opset {plan.opset}: Core ML programs have no ONNX opset", "leave --opset out")
    if plan.precision == "int8" and plan.min_target == "iOS16":
        raise UsageError("int8 activations need iOS17 or iOS18", "use --precision w8, or another --min-target")
    if plan.more_imgsz and plan.min_target != "iOS18":
        raise UsageError("a package takes several --imgsz from iOS18 on", "add --min-target iOS18, or export each size")
    if plan.more_imgsz and plan.precision in QUANTIZED:
        raise UsageError(f"a package in {plan.precision} takes one --imgsz", "export once for each size")
    if plan.head == "probs" and plan.labels and len(set(plan.labels)) < len(plan.labels):
        twice = next(label for label in plan.labels if plan.labels.count(label) > 1)
        raise UsageError(
            f"label {twice!r} occurs twice: a Core ML classifier stores probabilities by label",
            "make the labels unique, or use --head logits",
        )


def quantize(
    program: MlProgram,
    config: QuantizationConfig,
    preprocessing: Preprocessing,
    open_candidate: OpenCandidate,
    step: Step,
) -> Quantized:
    """Quantise the program. All targets use int8 activations in the same layers.

    In a module that other targets replace by one op, only the layers that the op takes as int8 get int8 activations.
    Raises CalibrationError.
    """
    inside = {mlprogram.network_path(path): op for path, op in fusable_modules(program.float_module)}
    return quantize_program(
        program.model,
        program.float_module,
        config,
        preprocessing,
        modules=program.modules,
        int8_inside={path: {f"{path}.{layer}" for layer in op.int8_layers.values()} for path, op in inside.items()},
        open_candidate=open_candidate,
        step=step,
    )


def build(program: MlProgram, plan: ExportPlan, folder: Path) -> Artifact:
    """Write `folder/model.mlpackage`, and the scripts that measure it on a Mac.

    For several image sizes the package has a function for each size.
    """
    check(plan)  # again: labels may come from the checkpoint
    path = folder / ARTIFACT
    for script in SCRIPTS:
        source = files("evm_deploy") / script
        (folder / Path(script).name).write_bytes(source.read_bytes())
    if not program.more:
        package.save(program.model, path)
        artifact = describe(path, program, plan, None)
        if not plan.settings.vision:
            return artifact
        return replace(artifact, details={**artifact.details, "vision": vision.write(program, plan, folder)})
    programs = {plan.imgsz or (0, 0): program, **program.more}
    names = {size: f"imgsz_{size_text(size)}" for size in programs}
    package.save_functions({names[size]: each.model for size, each in programs.items()}, path)
    first, *_ = found = [describe(path, each, plan, names[size]) for size, each in programs.items()]
    details = {**first.details, "functions": [{"name": name, "imgsz": list(size)} for size, name in names.items()]}
    return replace(first, details=details, more=dict(zip(program.more, found[1:], strict=True)))


def describe(path: Path, program: MlProgram, plan: ExportPlan, function: str | None) -> Artifact:
    """Return the artifact of a saved package. function: the one described, None for a package of one program."""
    from evm_deploy.runtimes.mil import Program

    saved = Program(path, function)
    details = {
        "min_target": plan.min_target or DEFAULT_MIN_TARGET,
        "specification_version": saved.spec.specificationVersion,
        "static_cost": static_cost(saved),
        "scans": tuple(scan_site(saved, site.name) for site in program.scans),
    }
    scan = Decision("portable", "standard MIL operations: Core ML runs no third-party kernels")
    return Artifact(path, scan, details, function=function)


def remarks(runtime: Runtime) -> list[str]:
    """Return a note if activations came near the largest float16: other images may exceed it and give Inf."""
    largest = getattr(runtime, "largest", 0.0)
    if largest <= float16.LARGEST / 2:
        return []
    return [
        f"activations reach {largest:.0f} on the test images, the largest float16 is {float16.LARGEST:.0f}: prefer fp32"
    ]


def write_scan_case(program: MlProgram, artifact: Artifact, path: Path, shape: ScanShape) -> None:
    """Write a float32 program of one scan of this shape, with all seven tensors as inputs."""
    package.save(mlprogram.scan_program(shape, artifact.details["min_target"]), path)


TARGET = Target(
    runtime=INFO,
    scans=("auto", "portable"),
    packages=("torch", "coremltools"),
    install_hint=INSTALL_HINT,
    build=build,
    scan_access=CoreMlScanAccess,
    write_scan_case=write_scan_case,
    usage=usage,
    trace=mlprogram.trace,
    trace_key=mlprogram.trace_key,
    quantize=quantize,
    min_targets=MIN_TARGETS,
    check=check,
    selftest_tolerances={**SELFTEST_TOLERANCES, "w8": TOLERANCES["fp16"]},  # computed in float16
    float16=("fp16", "int8", "w8"),
    settings=CoreMlSettings,
    several_sizes=True,
    image_channels=(1, 3),  # Core ML's image types: grey and RGB
    remarks=remarks,
    emulator=Emulator(emulator, library=lambda: None),
)

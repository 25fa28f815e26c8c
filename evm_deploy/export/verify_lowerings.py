"""Verification of an artifact against the float model, in every lowering that runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evm_deploy._util.progress import Step
from evm_deploy._util.text import size_text
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import ToolchainError
from evm_deploy.export import verify
from evm_deploy.export.plan import ExportPlan
from evm_deploy.export.selftest import TEST_INPUTS
from evm_deploy.export.source import Source
from evm_deploy.export.target import Artifact, Target, library_here, native_library, open_here
from evm_deploy.runtimes.base import RunOptions, TensorSpec, run_batched
from evm_deploy.tasks import get_task


@dataclass(frozen=True)
class Seen:
    """Results of the verification: the float model's run, the artifact's outputs, tensor specs and parity.

    plugin: the native library of the last lowering that ran, None if that was portable. remarks: the target's notes.
    """

    reference: verify.FloatRun
    outputs: dict[str, NDArray[Any]]
    interface: tuple[list[TensorSpec], list[TensorSpec]]
    parity: verify.Parity
    plugin: Path | None
    remarks: list[str]


def verified(
    source: Source, target: Target, artifact: Artifact, plan: ExportPlan, preprocessing: Preprocessing, step: Step
) -> Seen:
    """Compare the artifact with the float model, in every lowering that runs on this machine and every image size."""
    task = get_task(source.network(plan).spec.task)
    modes = lowerings(target, artifact)
    limits: dict[str, Any] = {"float16": plan.precision in target.float16, "scan_tolerance": target.scan_tolerance}
    with step("verify", f"{TEST_INPUTS} images, {len(artifact.details.get('scans', ()))} scans, {' and '.join(modes)}"):
        reference = source.float_run(plan, preprocessing)
        parities: dict[str, verify.Parity] = {}
        for mode, plugin in modes.items():
            with open_here(target, artifact.path, RunOptions(plugin=plugin, function=artifact.function)) as runtime:
                access = target.scan_access(artifact, plugin)
                parities[mode] = verify.verify(reference, runtime, access, plan, task, **limits)
                outputs = run_batched(runtime, plan.batch, reference.test_inputs)
                interface = list(runtime.inputs.values()), list(runtime.outputs.values())
                remarks = target.remarks(runtime)
        for size, each in artifact.more.items():
            there, smaller = replace(plan, imgsz=size, more_imgsz=()), replace(preprocessing, size=size)
            run = source.float_run(there, smaller)
            with open_here(target, each.path, RunOptions(function=each.function)) as runtime:
                access = target.scan_access(each, None)
                found = verify.verify(run, runtime, access, there, task, **limits)
            parities[f"portable {size_text(size)}"] = found
    return Seen(reference, outputs, interface, verify.worst(parities), plugin, remarks)


def lowerings(target: Target, artifact: Artifact) -> dict[str, Path | None]:
    """Return the lowerings that run on this machine: `portable`, `plugin` or both, each with its native library.

    Raises ToolchainError if none runs here, because then nothing can be verified.
    """
    found: dict[str, Path | None] = {"portable": None} if "portable" in artifact.scan.value.split("+") else {}
    plugin = native_library(target, artifact)
    if not found and not plugin:
        library_here(target)  # raises with the reason
        raise ToolchainError(f"no scan of the artifact runs on this machine: --scan {artifact.scan.value}")
    return {**found, "plugin": plugin} if plugin else found

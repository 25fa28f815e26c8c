"""export(): the whole flow, from a checkpoint to a verified bundle."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evm_deploy import __version__
from evm_deploy._util.progress import Step, silent
from evm_deploy._util.text import size_text
from evm_deploy.bundle.bundle import Bundle, check_free, keep, open_bundle, written_aside
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.bundle.readme import bundle_readme
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import AccuracyError, ParityError, ToolchainError, UsageError
from evm_deploy.export import quantization, selftest, verify
from evm_deploy.export.hub.graph import deployable
from evm_deploy.export.plan import MAX_DROP, ExportPlan, parse_imgsz
from evm_deploy.export.target import Artifact, Target, check_plan, native_library, open_here
from evm_deploy.export.targets import get_target
from evm_deploy.model.efficientvmamba.checkpoint import ModelSpec, load_checkpoint
from evm_deploy.runtimes.base import RunOptions, Runtime, run_batched
from evm_deploy.toolchain import cross
from evm_deploy.toolchain.platforms import host_platform

if TYPE_CHECKING:
    from torch import nn

DEFAULT_IMGSZ = (224, 224)


def export(
    checkpoint: str | Path, plan: ExportPlan, out: str | Path = "dist", *, force: bool = False, step: Step = silent
) -> Bundle:
    """Checkpoint -> verified bundle `out`/<stem>-<target>-<precision>-<HxW>.

    `step(name, detail)` is entered around each step, for progress. Raises EvmErrors; nothing half-written stays, and
    an artifact that fails parity is left as `*.rejected` (ParityError).
    """
    target = get_target(plan.target)
    plan = check_plan(target, plan)
    require_toolchain(target, plan)
    with step("load", Path(checkpoint).name):
        model, spec = load_checkpoint(checkpoint, head=plan.head, weights=plan.weights)
        plan, preprocessing = complete(plan, spec)
    path = bundle_path(out, target, plan, spec)
    check_free(path, force)
    reference = deployable(model, plan, preprocessing)
    with written_aside(path) as folder:
        with step("trace", f"{plan.sizes}, batch {plan.batch}"):
            in_float = target.trace(reference, plan, native_metadata(plan, spec, preprocessing))
        traced, quantized = quantization.quantize(in_float, plan, spec, preprocessing, target, step)
        with step("build", f"{target.name} {plan.precision}, scan {plan.scan}"):
            artifact = target.build(traced, plan, folder)
        if plan.device:
            with step("native", f"library for {plan.device}; compiling the first takes 1-2 minutes"):
                artifact = with_plugin(target, artifact, plan.device, folder)
        probes = selftest.probe_inputs(plan, preprocessing)
        modes = lowerings(target, artifact)
        with step("verify", f"{len(probes)} images, {len(traced.scans)} scans, {' and '.join(modes)}"):
            parities = {}
            for mode, plugin in modes.items():
                with open_here(target, artifact.path, RunOptions(plugin=plugin, function=artifact.function)) as runtime:
                    taps = target.taps(artifact, plugin)
                    parities[mode] = verify.verify(reference, runtime, taps, plan, probes)
                    outputs = run_batched(runtime, plan.batch, probes)
                    remarks = target.remarks(runtime)
            parities |= verify_more(target, artifact, reference, plan, preprocessing)
        parity = verify.worst(parities)
        manifest = describe(target, plan, spec, preprocessing, artifact, runtime, parity, remarks)
        if quantized:
            gain = None
            if not target.emulator:
                with step("time", f"{plan.precision} and float32 in turn, 1 thread"):
                    gain = quantization.gain_over_float32(target, in_float, plan, artifact.path, plugin, probes)
            manifest = quantization.record(manifest, quantized, gain, folder)
        try:
            verify.require(parity)
            quantization.require(manifest, quantized)
        except (ParityError, AccuracyError) as error:
            rejected = path.with_name(path.name + ".rejected")
            keep(folder, rejected, replace(manifest, rejected=True))
            raise type(error)(str(error), f"the artifact is kept for inspection: {rejected}") from error
        with step("bundle", path.name):
            expected, scans = verify.run_reference(reference, plan, probes)
            # quantised: what was verified here; the float model is further away than a device may be
            expected = outputs if quantized else expected
            limits = selftest.write(folder, target, artifact, traced, plan, preprocessing, probes, expected, scans)
            if plan.labels:
                (folder / "labels.txt").write_text("\n".join(plan.labels) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(bundle_readme(manifest, target.usage(manifest)), encoding="utf-8")
            bundle = keep(folder, path, replace(manifest, selftest=limits, built=target.finish is None))
    finishes = target.finish and finished_here(plan) and target.finish.possible()
    return finish(path, step=step) if finishes else bundle


def finished_here(plan: ExportPlan) -> bool:
    """Whether this machine may stand for the device: not where that is known to be another."""
    return plan.platform in (None, host_platform())


def finish(path: str | Path, *, library: str | None = None, step: Step = silent) -> Bundle:
    """Make what is missing in the bundle at `path`, such as TensorRT's engine, on this machine.

    library: the plugin that its scans need, if any. Raises UsageError for a bundle that has all, BundleError,
    ToolchainError.
    """
    bundle = open_bundle(path)
    if bundle.unpacked:
        raise UsageError(f"{path} is a zip: what is made in it would be lost", f"unzip {path}")
    target = get_target(bundle.manifest.target)
    if not target.finish:
        raise UsageError(f"{path} is for {target.name}, and finished", f"evm-run {path} --selftest")
    with step("finish", f"{bundle.path.name}, {target.name}"):
        target.finish.make(bundle.path, library)
    return open_bundle(path)


def verify_more(
    target: Target, artifact: Artifact, reference: nn.Module, plan: ExportPlan, preprocessing: Preprocessing
) -> dict[str, verify.Parity]:
    """Of an artifact for several sizes: the parity of each function but the first, portable."""
    parities = {}
    for size, each in artifact.more.items():
        there = replace(plan, imgsz=size, more_imgsz=())
        probes = selftest.probe_inputs(there, replace(preprocessing, size=size))
        with open_here(target, each.path, RunOptions(function=each.function)) as runtime:
            found = verify.verify(reference, runtime, target.taps(each, None), there, probes)
        parities[f"portable {size_text(size)}"] = found
    return parities


def with_plugin(target: Target, artifact: Artifact, device: str, folder: Path) -> Artifact:
    """Put the native library for `device` into the bundle in `folder`. Raises ToolchainError when it does not build."""
    assert target.libraries  # check_plan has seen to it
    library = target.libraries.build(device)
    inside = f"plugins/{device}/{library.name}"
    (folder / inside).parent.mkdir(parents=True)
    shutil.copyfile(library, folder / inside)
    return replace(artifact, plugins={device: inside})


def lowerings(target: Target, artifact: Artifact) -> dict[str, Path | None]:
    """The ways in which the artifact's scans can run here, each to be verified: portably, and on a native library."""
    found: dict[str, Path | None] = {"portable": None} if "portable" in artifact.scan.value.split("+") else {}
    plugin = native_library(target, artifact)
    return {**found, "plugin": plugin} if plugin else found


def complete(plan: ExportPlan, spec: ModelSpec) -> tuple[ExportPlan, Preprocessing]:
    """Fill what the plan leaves open from the checkpoint, else by default. Raises UsageError for what cannot be."""
    saved = spec.defaults
    imgsz = plan.imgsz or (parse_imgsz(saved["imgsz"]) if "imgsz" in saved else DEFAULT_IMGSZ)
    for size in (imgsz, *plan.more_imgsz):
        if min(size) < spec.min_pixels:
            raise UsageError(f"--imgsz {size_text(size)} is too small: at least {spec.min_pixels} pixels a side")
    chosen = {
        key: getattr(plan, key) if getattr(plan, key) is not None else saved.get(key)
        for key in ("mean", "std", "crop_pct", "interpolation")
    }
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items() if v is not None}
        preprocessing = Preprocessing(imgsz, **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"preprocessing: {error}") from error
    labels = plan.labels or (tuple(map(str, saved["labels"])) if "labels" in saved else None)
    if plan.head == "features":
        labels = None
    if labels and len(labels) != spec.num_classes:
        raise UsageError(
            f"{len(labels)} labels for a head of {spec.num_classes} classes",
            "give --labels one name per line, in order",
        )
    if labels and any(not label.strip() or len(label.splitlines()) > 1 for label in labels):
        raise UsageError("a label is empty or spans lines", "labels.txt holds one name per line")
    max_drop = MAX_DROP if plan.val and plan.max_drop is None else plan.max_drop
    return replace(plan, imgsz=imgsz, labels=labels, max_drop=max_drop), preprocessing


def require_toolchain(target: Target, plan: ExportPlan) -> None:
    """Raise ToolchainError unless this machine can build and verify for `target`, and compile for the plan's device."""
    found = target.probe()
    if not found.can_build:
        raise ToolchainError(f"target '{target.name}' cannot be built here: packages are missing", found.hint)
    if plan.device:
        cross.zig_version()


def bundle_path(out: str | Path, target: Target, plan: ExportPlan, spec: ModelSpec) -> Path:
    """`out`/<stem>-<target>-<precision>-<HxW>[+<HxW>..]."""
    return Path(out) / f"{spec.name}-{target.name}-{plan.precision}-{plan.sizes}"


def native_metadata(plan: ExportPlan, spec: ModelSpec, preprocessing: Preprocessing) -> dict[str, str]:
    """What travels inside the native file, for those who have only that."""
    facts = {
        "evm_deploy": __version__,
        "model": spec.name,
        "variant": spec.variant,
        "checkpoint_sha256": spec.checkpoint["sha256"],
        "preprocessing": json.dumps(asdict(preprocessing), sort_keys=True),
        "input": plan.input,
        "head": plan.head,
    }
    return {**facts, **({"labels": json.dumps(plan.labels)} if plan.labels else {})}


def untested(artifact: Artifact) -> list[str]:
    """What was compiled for other platforms and so could not be run here."""
    there = [name for name in artifact.plugins if name != host_platform()]
    return [f"plugins/{name} was compiled and not run here: check it there with evm-run --selftest" for name in there]


def describe(
    target: Target,
    plan: ExportPlan,
    spec: ModelSpec,
    preprocessing: Preprocessing,
    artifact: Artifact,
    runtime: Runtime,
    parity: verify.Parity,
    remarks: list[str],
) -> Manifest:
    """The manifest of an export, files still to be hashed."""
    sites = artifact.details.get("scans", ())
    return Manifest(
        name=f"{spec.name}-{target.name}-{plan.precision}",
        target=target.name,
        artifact=artifact.path.name,
        plan=plan.as_dict(),
        model=asdict(spec),
        preprocessing=asdict(preprocessing),
        inputs=[asdict(value) for value in runtime.inputs.values()],
        outputs=[asdict(value) for value in runtime.outputs.values()],
        scan={
            **asdict(artifact.scan),
            "nodes": [site.name for site in sites],
            **({"plugins": dict(artifact.plugins)} if artifact.plugins else {}),
        },
        details={key: value for key, value in artifact.details.items() if key != "scans"},
        versions={"evm_deploy": __version__, "python": platform.python_version(), **target.probe().versions},
        parity=parity.as_dict(),
        notes=[*spec.notes, *untested(artifact), *remarks],
    )

"""Export of a network to a verified bundle: the whole flow, step by step."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from evm_deploy._util.files import native_path
from evm_deploy._util.progress import Step, silent
from evm_deploy._util.text import command, size_text
from evm_deploy._util.torch_settings import default_torch_settings
from evm_deploy._util.values import label, listed, path_text, wrong
from evm_deploy.bundle.archive import write_zip
from evm_deploy.bundle.bundle import Bundle, check_free, commit, open_bundle, publish, seal, temporary_bundle
from evm_deploy.bundle.manifest import Decision, portable
from evm_deploy.bundle.readme import bundle_readme
from evm_deploy.bundle.signing import private_key, public_key
from evm_deploy.bundle.signing import sign as sign_bundle
from evm_deploy.data.preprocessing import Preprocessing
from evm_deploy.errors import AccuracyError, BundleError, ParityError, ToolchainError, UsageError
from evm_deploy.export import quantization, selftest, verify
from evm_deploy.export.description import describe, native_metadata
from evm_deploy.export.layouts import arranged, files_of_layout
from evm_deploy.export.network_input import assumed, check_channels
from evm_deploy.export.plan import (
    DEFAULT_IMGSZ,
    MAX_DROP,
    ExportPlan,
    check_labels,
    read_size,
)
from evm_deploy.export.preprocessing import make_preprocessing
from evm_deploy.export.selection import check_whole_image, complete_selection
from evm_deploy.export.source import Source
from evm_deploy.export.target import Artifact, Target, Traced, check_plan, library_here
from evm_deploy.export.targets import get_target
from evm_deploy.export.verify_lowerings import verified
from evm_deploy.model.factory import Factory
from evm_deploy.model.graph_file import GraphFile
from evm_deploy.model.network import ModelSpec, Network
from evm_deploy.tasks import get_task
from evm_deploy.tasks.classification import PROBABILITIES
from evm_deploy.toolchain import cross_compile
from evm_deploy.toolchain.platforms import host_platform


@default_torch_settings()
def export(
    source: str | Path | Factory | GraphFile | Network | Source,
    plan: ExportPlan,
    out: str | Path = "dist",
    *,
    force: bool = False,
    sign: str | Path | None = None,
    zipped: bool = False,
    step: Step = silent,
) -> Bundle:
    """Export a network to a verified bundle, `out`/<stem>-<target>-<precision>-<HxW>.

    source: a checkpoint's path, a Factory, whose code then runs in this process, a GraphFile, a Network, or a Source
    that several exports share (a Source loads and traces once).
    force: replace a bundle that is already there. sign: PEM file of the ed25519 private key that signs the bundle.
    zipped: also write <bundle>.zip. `step(name, detail)`: context manager around each step, for progress.
    Torch computes with its default settings meanwhile, whatever the host program has set (`default_torch_settings`).
    Raises EvmErrors. No half-written bundle is left. An artifact that fails the check of parity or accuracy is kept as
    `*.rejected`, and the error is a ParityError or AccuracyError.
    """
    if not isinstance(plan, ExportPlan):
        raise wrong("plan", plan, "an ExportPlan")
    key = private_key(sign) if sign else None
    source, out = Source.of(source), path_text("out", out)
    target = get_target(plan.target)
    plan = check_plan(target, plan)
    require_toolchain(target, plan)
    with step("load", source.name):
        spec = source.network(plan).spec
        given, (plan, preprocessing) = plan, complete(plan, spec)
    path = bundle_path(out, target, plan, spec)
    native_path(path.absolute())
    check_free(path, force, zipped)
    with contextlib.ExitStack() as stack, temporary_bundle(path) as folder:
        with step("trace", f"{plan.sizes}, batch {plan.batch}"):
            in_float = source.traced(target, plan, preprocessing, native_metadata(plan, spec, preprocessing))
        kept = stack.enter_context(quantization.keeping(in_float, plan, spec, preprocessing, target))
        traced, quantized = quantization.quantize(in_float, plan, spec, preprocessing, target, kept, step)
        with step("build", f"{target.runtime.label} {plan.precision}, scan {plan.scan}"):
            artifact = built(target, traced, plan, folder)
        if plan.native_library:
            with step("native", f"library for {plan.native_library}; the first compilation takes 1-2 minutes"):
                artifact = with_plugin(target, artifact, plan.native_library, folder)
        seen = verified(source, target, artifact, plan, preprocessing, step)
        manifest = describe(target, plan, spec, preprocessing, artifact, seen)
        manifest = replace(manifest, notes=[*assumed(given, spec, preprocessing), *manifest.notes])
        if quantized:
            gain = None
            if not target.emulator:
                with step("time", f"{plan.precision} and float32 in turn, 1 thread"):
                    test_inputs = seen.reference.test_inputs
                    gain = quantization.gain_over_float32(
                        target, in_float, plan, artifact.path, seen.plugin, test_inputs
                    )
            manifest = quantization.with_quantization(manifest, quantized, gain, folder)
        try:
            verify.require(seen.parity)
            quantization.require(manifest, quantized)
        except (ParityError, AccuracyError) as error:
            rejected = path.with_name(path.name + ".rejected")
            hint = f"the artifact is kept for inspection: {rejected}"
            try:
                commit(folder, rejected, replace(manifest, rejected=True), force=True)
            except BundleError as not_kept:
                hint = f"the artifact is not kept: {not_kept.args[0].removesuffix(': --force does not replace it')}"
            raise type(error)(str(error), hint) from error
        with step("bundle", path.name):
            # quantised: expect the artifact's outputs from this machine. The float model's differ from them by more
            # than the self-test allows.
            expected = seen.outputs if quantized else seen.reference.outputs
            reference = replace(seen.reference, outputs=expected)
            limits = selftest.write(folder, target, artifact, traced, plan, preprocessing, reference)
            if plan.labels:
                (folder / "labels.txt").write_text("\n".join(plan.labels) + "\n", encoding="utf-8")
            manifest = arranged(plan, manifest, folder, path.name)
            readme = bundle_readme(manifest, target.usage(manifest), files_of_layout(plan))
            (folder / "README.md").write_text(readme, encoding="utf-8")
            seal(folder, replace(manifest, selftest=limits, built=target.engine is None))
        failed = None
        if target.engine and engine_built_here(plan) and target.engine.possible():
            try:
                with step("engine", f"{path.name}, {target.name}"):
                    target.engine.make(folder)
            except ToolchainError as error:
                failed = ToolchainError(error.args[0], f"the bundle is left without its engine: {path}")
        bundle = publish(folder, path, force=force, key=key)
    if failed:
        raise failed
    if zipped:
        write_zip(bundle.path, force)
    return bundle


def built(target: Target, traced: Traced, plan: ExportPlan, folder: Path) -> Artifact:
    """Build the artifact in `folder`. With scan `auto`, a network without scans gets no native library."""
    if traced.scans or plan.scan != "auto":
        return target.build(traced, plan, folder)
    artifact = target.build(traced, replace(plan, scan="portable"), folder)
    return replace(artifact, scan=Decision("portable", "the network has no Mamba-1 scan: standard operations only"))


def engine_built_here(plan: ExportPlan) -> bool:
    """Test whether the engine may be built on this machine: not if the plan names another platform."""
    return plan.platform in (None, host_platform())


def build_engine(
    path: str | Path,
    *,
    library: str | None = None,
    timing_cache: str | None = None,
    sign: str | Path | None = None,
    require_signature: str | Path | None = None,
    step: Step = silent,
) -> Bundle:
    """Build the engine of the bundle at `path`, such as TensorRT's, on this machine. Returns the bundle with it.

    library: path of the plugin's library, if the bundle's scans need one. timing_cache: file that the builder reads and
    updates. require_signature: PEM file of the public key that must have signed the bundle. The signature does not
    cover the engine and is removed; sign: PEM file of the private key for a new one. Raises UsageError for a zip, and
    for a bundle whose target has no engine. Raises BundleError for a damaged bundle, ToolchainError if the build fails.
    """
    key = private_key(sign) if sign else None
    bundle = open_bundle(path, public_key(require_signature) if require_signature else None)
    if bundle.unpacked:
        raise UsageError(f"{path} is a zip: an engine built in it would be lost", command("unzip", Path(path)))
    target = get_target(bundle.manifest.target)
    if not target.engine:
        raise UsageError(
            f"{path}: bundles for '{target.name}' have no engine to build",
            f"use it as it is:  {command('evm-run', Path(path), '--selftest')}",
        )
    with step("engine", f"{bundle.path.name}, {target.runtime.label}"):
        target.engine.make(bundle.path, library, timing_cache)
    if key:
        sign_bundle(bundle.path, key)
    return open_bundle(path)


def with_plugin(target: Target, artifact: Artifact, platform: str, folder: Path) -> Artifact:
    """Put the native library for `platform` into the bundle in `folder`. Returns the artifact with this library.

    Raises ToolchainError if the library cannot be built.
    """
    assert target.libraries  # check_plan refuses --platform for other targets
    library = target.libraries.build(platform)
    inside = f"plugins/{platform}/{library.name}"
    (folder / inside).parent.mkdir(parents=True)
    shutil.copyfile(library, folder / inside)
    return replace(artifact, plugins={platform: inside})


def complete(plan: ExportPlan, spec: ModelSpec) -> tuple[ExportPlan, Preprocessing]:
    """Fill the plan's open settings from the checkpoint, else with defaults. Returns the plan and its preprocessing.

    Raises UsageError for settings that do not fit the network.
    """
    saved = spec.defaults
    imgsz = plan.imgsz or read_size("the checkpoint's imgsz", saved.get("imgsz", DEFAULT_IMGSZ))
    if imgsz in plan.more_imgsz:
        raise UsageError(f"--imgsz names the size {size_text(imgsz)} twice")
    for size in (imgsz, *plan.more_imgsz):
        if min(size) < spec.min_pixels:
            raise UsageError(f"--imgsz {size_text(size)} is too small: at least {spec.min_pixels} pixels a side")
    preprocessing = make_preprocessing(imgsz, plan.preprocessing, saved, spec.channels)
    check_channels(plan, spec)
    check_whole_image(preprocessing, spec)
    task = get_task(spec.task)
    head = plan.head or (PROBABILITIES if plan.multi_label else task.heads[0])
    if head not in task.heads:
        raise UsageError(f"--head {head}: {spec.name} gives {' or '.join(task.heads)}", "leave --head out")
    if plan.val and not task.score:
        raise UsageError(
            f"--val with --head {head}: outputs of this head have no labels to compare with", "leave --val out"
        )
    plan = complete_selection(plan, spec, get_target(plan.target))
    labels = plan.labels or (listed("the checkpoint's labels", saved["labels"], label) if "labels" in saved else None)
    if not task.decode:
        labels = None
    if labels and len(labels) != spec.num_classes:
        raise UsageError(
            f"{len(labels)} labels for a head of {spec.num_classes} classes",
            "give --labels one name per line, in order",
        )
    if labels:
        check_labels("labels", labels)
    max_drop = MAX_DROP if plan.val and plan.max_drop is None else plan.max_drop
    return replace(plan, imgsz=imgsz, head=head, labels=labels, max_drop=max_drop), preprocessing


def require_toolchain(target: Target, plan: ExportPlan) -> None:
    """Raise ToolchainError unless this machine can build for `target`, and compile and verify the plan's scans."""
    found = target.environment()
    if not found.can_build:
        raise ToolchainError(f"target '{target.name}' cannot be built here: packages are missing", found.hint)
    if plan.native_library:
        cross_compile.zig_version()
    if plan.scan in ("plugin", "aot") and plan.native_library != host_platform():
        try:
            library_here(target)
        except ToolchainError as error:
            raise ToolchainError(
                f"an export with --scan {plan.scan} cannot be verified here: {error.args[0]}", error.hint
            ) from error


def bundle_path(out: str | Path, target: Target, plan: ExportPlan, spec: ModelSpec) -> Path:
    """Return the bundle's path, `out`/<stem>-<target>-<precision>-<HxW>[+<HxW>..]; any file system takes the name."""
    return Path(out) / f"{portable(spec.name)}-{target.name}-{plan.precision}-{plan.sizes}"

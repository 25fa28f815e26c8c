"""Comparison of one checkpoint in several forms (`evm-bench --matrix`): export and measure each target and precision.

Bundles and records of an earlier call are reused if they are still current.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from evm_deploy import __version__
from evm_deploy._util.files import sha256
from evm_deploy._util.progress import Progress, Step, silent
from evm_deploy.bench import device
from evm_deploy.bench.float_model import FloatModel
from evm_deploy.bench.measurable import TORCH
from evm_deploy.bench.record import Record, Settings
from evm_deploy.bench.run import bench
from evm_deploy.bench.text import record_path
from evm_deploy.bundle.bundle import open_bundle
from evm_deploy.bundle.loaded import load
from evm_deploy.bundle.manifest import FILE as MANIFEST
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.calib.candidate import feeds
from evm_deploy.calib.evaluate import Accuracy, compare_outputs
from evm_deploy.calib.evaluation import stacked
from evm_deploy.calib.int8 import image_sets
from evm_deploy.data.boxes import DEFAULT_SELECTION
from evm_deploy.data.images import ImageSet, labelled_images
from evm_deploy.demo import images_path
from evm_deploy.errors import BundleError, EvmError, UsageError
from evm_deploy.export.pipeline import bundle_path, complete, export
from evm_deploy.export.plan import CALIBRATED, QUANTIZED, ExportPlan, canonical_precision, parse_imgsz
from evm_deploy.export.quantization import quantization_config
from evm_deploy.export.source import Source
from evm_deploy.export.target import Target, check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.runtimes.base import Batch
from evm_deploy.tasks import get_task
from evm_deploy.tasks.task import Outputs, Reading

FORMS = "torch:fp32,onnx:fp32,onnx:int8,openvino:fp32,openvino:int8"
CHUNK = 16  # images per inference of the float model
BUNDLES = "bundles"  # subfolder of the records' folder


@dataclass(frozen=True)
class Form:
    """Target and precision of one export in a comparison. Target `torch` is the checkpoint itself, not exported."""

    target: str
    precision: str

    def __str__(self) -> str:
        return f"{self.target} {self.precision}"


@dataclass(frozen=True)
class Matrix:
    """Settings of a comparison, which makes one record for each form and each of `settings`.

    settings: each with its `batch`. out: folder for the records; bundles go into its subfolder `bundles`.
    imgsz: input size; None: saved with the weights. weights, drop, calib, val: as for ExportPlan; with `val` the
    accuracy of every form is measured.
    """

    checkpoint: Path
    forms: tuple[Form, ...]
    settings: tuple[Settings, ...]
    out: Path
    imgsz: str | None = None
    calib: str | None = None
    val: str | None = None
    weights: str = "ema"
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormOutcome:
    """Result of a comparison. records: paths in the order of the forms. failed: error of each form that failed."""

    records: list[Path] = field(default_factory=list)
    failed: dict[Form, EvmError] = field(default_factory=dict)


def parse_forms(text: str) -> tuple[Form, ...]:
    """Parse `torch:fp32,onnx:int8` into forms, without duplicates; aliases such as onnx:w8a16 are resolved.

    A form without a precision gets the first one of its target. Raises UsageError for an unknown target or precision.
    """
    forms = []
    for part in text.split(","):
        name, _, precision = part.strip().partition(":")
        if name == TORCH:
            if precision not in ("", "fp32"):
                raise UsageError(f"--forms {part}: torch measures the checkpoint unchanged", f"use {TORCH}:fp32")
            forms.append(Form(TORCH, "fp32"))
            continue
        target, precision = get_target(name, "--forms"), canonical_precision(precision)
        if precision and precision not in target.precisions:
            has = ", ".join(target.precisions)
            raise UsageError(f"--forms {part}: target '{target.name}' has no such precision", f"choose from: {has}")
        forms.append(Form(target.name, precision or target.precisions[0]))
    return tuple(dict.fromkeys(forms))


def no_progress(done: int, total: int) -> None:
    """Ignore the progress of a comparison."""


def run_matrix(matrix: Matrix, step: Step = silent, progress: Progress = no_progress) -> FormOutcome:
    """Export and measure every form. A form that fails does not stop the others.

    step: context manager `step(name, detail)` that is entered around each step. progress: called with the number of
    forms that are done, and of all forms. A bundle from the same plan, checkpoint and package versions is reused. A
    stable record of the same bundle, settings and machine is reused. Raises EvmError if the checkpoint cannot be used.
    """
    source = Checkpoint(matrix)
    outcome = FormOutcome()
    for done, form in enumerate(matrix.forms):
        progress(done, len(matrix.forms))
        try:
            path = source.path if form.target == TORCH else source.exported(form, step)
            for settings in matrix.settings:
                outcome.records.append(source.measured(form, path, settings, step))
        except EvmError as error:
            outcome.failed[form] = error
    return outcome


class Checkpoint:
    """Checkpoint of a comparison, with methods that make its bundles and records or find current ones."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.path = matrix, matrix.checkpoint
        self.source = Source(matrix.checkpoint)
        self.float = FloatModel(self.path, self.in_torch(Settings()))
        self.digests: dict[tuple[Any, ...], list[str | None]] = {}

    def in_torch(self, settings: Settings) -> Settings:
        """Return the settings with what a measurement of the checkpoint itself must know."""
        weights = None if self.matrix.weights == "ema" else self.matrix.weights
        return replace(settings, imgsz=self.matrix.imgsz, weights=weights, drop=",".join(self.matrix.drop) or None)

    def exported(self, form: Form, step: Step) -> Path:
        """Return the path of the form's bundle; export it unless a current one exists. Raises EvmError."""
        target, plan = get_target(form.target), self.plan(form)
        path = bundle_path(self.matrix.out / BUNDLES, target, plan, self.float.spec)
        if not self.is_current(path, target, plan):
            with step("export", f"{form}, {plan.sizes}"):
                export(self.source, plan, path.parent, force=True)
        return path

    def plan(self, form: Form) -> ExportPlan:
        """Return the complete plan of a form, as the bundle's manifest stores it."""
        evaluated = form.precision in QUANTIZED
        calibrated = form.precision in CALIBRATED or (evaluated and not self.matrix.val)
        plan = ExportPlan(
            form.target,
            form.precision,
            imgsz=parse_imgsz(self.matrix.imgsz) if self.matrix.imgsz else None,
            batch=Batch.parse("1" if all(each.batch == 1 for each in self.matrix.settings) else "dynamic"),
            calib=self.matrix.calib if calibrated else None,
            val=self.matrix.val if evaluated else None,
            weights=self.matrix.weights,
            drop=self.matrix.drop,
        )
        return complete(check_plan(get_target(form.target), plan), self.float.spec)[0]

    def is_current(self, path: Path, target: Target, plan: ExportPlan) -> bool:
        """Test whether the bundle at `path` was made from the same plan, checkpoint and package versions."""
        try:
            manifest = open_bundle(path).manifest
        except BundleError:
            return False
        made_with = {**target.environment().versions, "evm_deploy": __version__}
        return (
            manifest.plan == json.loads(json.dumps(plan.as_dict()))
            and manifest.model["checkpoint"]["sha256"] == self.float.spec.checkpoint["sha256"]
            and made_with.items() <= manifest.versions.items()
            and (plan.precision not in QUANTIZED or self.same_images(manifest, plan))
        )

    def same_images(self, manifest: Manifest, plan: ExportPlan) -> bool:
        """Test whether a bundle was calibrated and evaluated on the images that the plan names now, by their content.

        Raises CalibrationError.
        """
        config = quantization_config(plan, self.float.spec)
        key = (config.precision, config.calib, config.val)
        if key not in self.digests:
            images = image_sets(config, self.float.preprocessing, silent)
            self.digests[key] = [each.digest() if each else None for each in images]
        calibration = manifest.details.get("quantization", {}).get("calibration", {}).get("images", {})
        return [calibration.get("sha256"), (manifest.accuracy or {}).get("images_sha256")] == self.digests[key]

    def measured(self, form: Form, path: Path, settings: Settings, step: Step) -> Path:
        """Return the path of the form's record; measure it unless a stable one exists. Raises EvmError.

        The record of a form whose manifest has no accuracy gets the accuracy on `matrix.val`, or none without it.
        """
        settings = self.in_torch(settings) if form.target == TORCH else settings
        subject = sha256(path if form.target == TORCH else path / MANIFEST)
        file, record = find_record(self.matrix.out, subject, settings, self.versions(form)) or (None, None)
        with step("kept" if record else "measure", f"{form}, {settings}"):
            record = record or bench(path, settings)
        in_manifest = form.target != TORCH and Manifest.read(path).accuracy
        wanted = self.images.digest() if self.matrix.val else None
        if not in_manifest and (record.bundle.get("accuracy") or {}).get("images_sha256") != wanted:
            accuracy = None
            if self.matrix.val:
                with step("evaluate", f"{form}, {len(self.images)} images"):
                    accuracy = {**self.accuracy(form, path).as_dict(), "images_sha256": wanted}
            file, record = None, replace(record, bundle={**record.bundle, "accuracy": accuracy})
        if file is None:
            file = record_path(self.matrix.out, record)
            record.write(file)
        return file

    def versions(self, form: Form) -> Mapping[str, str]:
        """Return the versions of the packages that run a form on this machine."""
        if form.target == TORCH:
            versions: dict[str, str] = self.float.runtime()["versions"]
            return versions
        return get_target(form.target).runtime.availability().versions

    def accuracy(self, form: Form, path: Path) -> Accuracy:
        """Measure the accuracy of a float form on the labelled images `matrix.val`."""
        if form.target == TORCH:
            outputs = self.expected
        else:
            with load(path) as model:
                (name,) = model.inputs
                outputs = stacked(model.run({name: feed}) for feed in feeds(self.images, name, model))
        plan, images = self.float.plan, self.images
        spec, selection = self.float.spec, plan.selection or DEFAULT_SELECTION
        reading = Reading(plan.labels, places=images.places, selection=selection, classes=spec.num_classes)
        return compare_outputs(self.expected, outputs, get_task(spec.task), images.labels, reading=reading)

    @cached_property
    def images(self) -> ImageSet:
        """Labelled images of `matrix.val`. Raises CalibrationError."""
        spec, plan = self.float.spec, self.float.plan
        score = get_task(spec.task).score
        if not score:
            raise UsageError(f"--val: {spec.name} gives {spec.task}, which has no labels", "leave --val out")
        source = images_path(str(self.matrix.val), "heldout", spec.task)
        return labelled_images(source, self.float.preprocessing, spec.num_classes, plan.labels, read=score.read)

    @cached_property
    def expected(self) -> Outputs:
        """Outputs of the float model on the labelled images."""
        pixels = self.images.pixels()
        chunks = iter(lambda: list(islice(pixels, CHUNK)), [])
        parts = [self.float.run(np.stack(chunk)) for chunk in chunks]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def find_record(
    folder: Path, subject: str, settings: Settings, versions: Mapping[str, str]
) -> tuple[Path, Record] | None:
    """Return a stable record in `folder` with these settings from this machine, and its path, or None.

    subject: sha256 of the bundle's manifest, or of the checkpoint. versions: of the packages that run the model.
    """
    wanted = {key: value for key, value in settings.as_dict().items() if key != "limit_s"}
    here = device.facts()
    for file in sorted(folder.glob("*.json")):
        try:
            record = Record.read(file)
        except UsageError:
            continue  # not a record, or of another schema version
        same_machine = here.items() <= record.device.items()
        same_settings = wanted.items() <= record.settings.items()
        same = same_machine and same_settings and record.runtime["versions"] == dict(versions)
        if record.stable and same and record.bundle.get("manifest_sha256") == subject:
            return file, record
    return None

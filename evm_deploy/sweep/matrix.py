"""Comparison of one checkpoint in several forms (`evm-bench --matrix`): a sweep of one checkpoint on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evm_deploy.bench import device
from evm_deploy.bench.measurable import TORCH
from evm_deploy.bench.record import Settings
from evm_deploy.errors import EvmError
from evm_deploy.export.plan import MAX_DROP, ExportPlan, parse_imgsz
from evm_deploy.sweep.boards import HERE
from evm_deploy.sweep.engine import LocalEngine
from evm_deploy.sweep.float_network import LIKE, FloatCheckpoint, source_of
from evm_deploy.sweep.folder import RunFolder
from evm_deploy.sweep.forms import Form
from evm_deploy.sweep.keys import digest
from evm_deploy.sweep.plan import SweepPlan, export_unit, known_digests
from evm_deploy.sweep.run import Report, SweepRun, no_report
from evm_deploy.sweep.units import ExportUnit, MeasurementUnit, Subject


@dataclass(frozen=True)
class Matrix:
    """Settings of a comparison, which makes one record for each form and each of `settings`.

    settings: each with its `batch`. out: folder of a sweep, with the bundles and records. imgsz: input size; None: that
    saved with the weights. weights, drop, calib, val: as for ExportPlan; with `val` the accuracy of every form is
    measured.
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


def run_matrix(matrix: Matrix, report: Report = no_report) -> FormOutcome:
    """Export, evaluate and measure every form. A form that fails does not stop the others.

    report: called with each unit that has ended. What is done already is kept: units in `matrix.out` with the same key,
    and stable latencies of this machine. Raises EvmError if the checkpoint or the images cannot be used.
    """
    subjects, failed = _subjects(matrix)
    machine = digest(device.facts())
    measurements = {
        form: [MeasurementUnit(subject, HERE, each, machine) for each in _settings(matrix, form)]
        for form, subject in subjects.items()
    }
    plan = SweepPlan(
        tuple(each for each in subjects.values() if isinstance(each, ExportUnit)),
        tuple(each for every in measurements.values() for each in every),
        matrix.val,
        tuple(each for each in subjects.values() if isinstance(each, FloatCheckpoint)),
    )
    folder, engine = RunFolder(matrix.out.resolve()), LocalEngine()
    with folder.locked(beside=True):
        for each in plan.measurements:
            facts = folder.done(each.key)
            if facts and not facts["result"]["stable"]:
                folder.undo(each.key)
        run = SweepRun(plan, folder, retry_failed=True)
        try:
            run.run(engine, report)
        finally:
            engine.close()
    results = [run.outcomes[each.key].result for each in plan.measurements]
    failed |= {form: error for form, subject in subjects.items() if (error := run.error_of(subject))}
    ordered = {form: failed[form] for form in matrix.forms if form in failed}
    return FormOutcome([matrix.out / each["record"] for each in results if each], ordered)


def _subjects(matrix: Matrix) -> tuple[dict[Form, Subject], dict[Form, EvmError]]:
    """Return what is measured for each form, and the error of each form that is not possible."""
    known, checkpoint = known_digests(), matrix.checkpoint.resolve()
    size = parse_imgsz(matrix.imgsz) if matrix.imgsz else None
    plan = ExportPlan(LIKE, "fp32", imgsz=size, weights=matrix.weights, drop=matrix.drop)
    source_of(str(checkpoint), known.file(checkpoint)).network(plan)  # the first error of a bad file
    for images in (matrix.calib, matrix.val):
        known.images(images)
    more: dict[str, Any] = {"weights": matrix.weights, "drop": matrix.drop}
    more["batch"] = "1" if all(each.batch == 1 for each in matrix.settings) else "dynamic"
    if matrix.val:
        more["max_drop"] = MAX_DROP
    subjects: dict[Form, Subject] = {}
    failed: dict[Form, EvmError] = {}
    for form in matrix.forms:
        try:
            if form.target == TORCH:
                subjects[form] = FloatCheckpoint.of(str(checkpoint), known.file(checkpoint), plan)
            else:
                subjects[form] = export_unit(checkpoint, form, size, more, matrix.calib, matrix.val, known)
        except EvmError as error:
            failed[form] = error
    return subjects, failed


def _settings(matrix: Matrix, form: Form) -> tuple[Settings, ...]:
    """Return the settings of a form; those of torch also say which weights of the checkpoint are measured."""
    if form.target != TORCH:
        return matrix.settings
    weights = None if matrix.weights == "ema" else matrix.weights
    drop = ",".join(matrix.drop) or None
    return tuple(replace(each, imgsz=matrix.imgsz, weights=weights, drop=drop) for each in matrix.settings)

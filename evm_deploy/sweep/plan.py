"""Plan of a sweep: read its TOML file, and list its exports and measurements, without loading a network."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from evm_deploy import __version__
from evm_deploy._util.files import sha256
from evm_deploy._util.text import one_of
from evm_deploy._util.toml import read_toml
from evm_deploy.bench.measurable import TORCH
from evm_deploy.bench.record import Settings
from evm_deploy.demo import WORD, checkpoint_path
from evm_deploy.errors import CheckpointError, UsageError
from evm_deploy.export.plan import CALIBRATED, DEFAULTS, HOW_TO_CALIBRATE, QUANTIZED, ExportPlan, parse_imgsz
from evm_deploy.export.target import check_plan
from evm_deploy.export.targets import get_target
from evm_deploy.sweep.boards import HERE
from evm_deploy.sweep.float_network import FloatCheckpoint
from evm_deploy.sweep.forms import Form, parse_forms
from evm_deploy.sweep.keys import source_digest
from evm_deploy.sweep.units import ExportUnit, MeasurementUnit, Subject

KEYS = ("checkpoints", "forms", "imgsz", "exclude", "data", "export", "bench")
DATA, EXCLUDE = ("calib", "val"), ("checkpoint", "form", "imgsz")
BENCH = ("board", "threads", "batch", "streams", "scan", "end_to_end", "limit")
PLANNED = ("target", "precision", "imgsz", "more_imgsz", "calib", "val", "chosen", "settings")  # not in [export]
FOR_QUANTIZED = (*HOW_TO_CALIBRATE, "smooth", "weight_bits", "max_drop")
MAX_LIMIT_S = 3600


@dataclass(frozen=True)
class SweepPlan:
    """Exports and measurements of a sweep.

    val: labelled images that every bundle is evaluated on, None for none. floats: float networks that are candidates.
    """

    exports: tuple[ExportUnit, ...]
    measurements: tuple[MeasurementUnit, ...]
    val: str | None
    floats: tuple[FloatCheckpoint, ...] = ()

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All candidates."""
        return *self.exports, *self.floats


@dataclass(frozen=True)
class Digests:
    """Digests of files and of sets of images, each computed once for a plan."""

    file: Callable[[Path], str]
    images: Callable[[str | None], str]


def read_sweep(path: Path) -> SweepPlan:
    """Read the sweep in the TOML file `path`. Relative paths in it start at its folder.

    Raises UsageError that names the file and the key, and errors of impossible exports, before any work.
    """
    where = f"sweep {path}"
    content = read_toml(path, "sweep")
    for key in content:
        one_of(f"{where}: key", key, KEYS)
    checkpoints = _checkpoints(where, path.parent, _texts(where, content, "checkpoints"))
    forms = parse_forms(",".join(_texts(where, content, "forms")))
    if any(form.target == TORCH for form in forms):
        raise UsageError(f"{where}: forms: torch is no target", "evm-bench --matrix measures a checkpoint unchanged")
    sizes: Sequence[tuple[int, int] | None] = [
        parse_imgsz(size) for size in _list(where, content, "imgsz", (str, int))
    ] or [None]
    tables = _list(where, content, "exclude", (dict,))
    excluded = [_table(f"{where}: exclude {i}", each, EXCLUDE) for i, each in enumerate(tables, 1)]
    data = _table(f"{where}: data", content.get("data", {}), DATA)
    calib, val = (_images(f"{where}: data: {key}", path.parent, data.get(key)) for key in DATA)
    benches = [_bench(f"{where}: bench {i}", each) for i, each in enumerate(_list(where, content, "bench", (dict,)), 1)]
    more = _more(f"{where}: export", content.get("export", {}), benches)
    known = known_digests()
    exports = tuple(
        export_unit(checkpoint, form, size, more, calib, val, known)
        for checkpoint, size, form in itertools.product(checkpoints, sizes, forms)
        if not any(_matches(each, checkpoint, form, size) for each in excluded)
    )
    if not exports:
        raise UsageError(f"{where}: nothing is left to export", "exclude less")
    measurements = tuple(
        MeasurementUnit(export, board, settings) for board, every in benches for export in exports for settings in every
    )
    return SweepPlan(exports, tuple({each.key: each for each in measurements}.values()), val)


def known_digests() -> Digests:
    """Return the digests of a new plan."""
    return Digests(cache(_checkpoint_sha256), cache(source_digest))


def _checkpoint_sha256(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's file as hex digits. Raises CheckpointError if it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(f"checkpoint {path} {why}", "give the path of a checkpoint file") from error


def export_unit(
    checkpoint: Path,
    form: Form,
    size: tuple[int, int] | None,
    more: Mapping[str, Any],
    calib: str | None,
    val: str | None,
    known: Digests,
) -> ExportUnit:
    """Return the unit of one export. more: further settings; those for int8 and w8 are left out of float exports.

    Raises UsageError for an impossible plan, CalibrationError for missing images.
    """
    gated = form.precision in QUANTIZED and more.get("max_drop") is not None
    wanted = form.precision in CALIBRATED or (form.precision in QUANTIZED and not gated)
    plan = ExportPlan(
        form.target,
        form.precision,
        imgsz=size,
        calib=calib if wanted else None,
        val=val if gated else None,
        **{key: value for key, value in more.items() if form.precision in QUANTIZED or key not in FOR_QUANTIZED},
    )
    target = get_target(form.target)
    plan = check_plan(target, plan)
    versions = {**target.environment().versions, "evm_deploy": __version__}
    images = (known.images(plan.calib), known.images(plan.val))
    return ExportUnit(str(checkpoint), known.file(checkpoint), plan, images, tuple(sorted(versions.items())))


def _checkpoints(where: str, folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files that the patterns name. Raises UsageError for a pattern without files, and equal names."""
    found: list[Path] = []
    for pattern in patterns:
        if pattern.startswith(f"{WORD}:"):
            found.append(checkpoint_path(pattern))
            continue
        files = _files(folder, pattern)
        if not files:
            raise UsageError(f"{where}: checkpoints: no file {pattern}", "relative paths start at the sweep's folder")
        found += files
    found = list(dict.fromkeys(each.resolve() for each in found))
    names: dict[str, Path] = {}
    for each in found:
        if names.setdefault(each.stem, each) != each:
            raise UsageError(
                f"{where}: {names[each.stem]} and {each} have the same name: their bundles could not be told apart",
                "rename one of them",
            )
    return found


def _files(folder: Path, pattern: str) -> list[Path]:
    """Return the files that a path or pattern names, sorted; none for a pattern that cannot be one."""
    path = Path(pattern)
    base = Path(path.anchor) if path.is_absolute() else folder  # whose name may have the signs of a pattern
    try:
        if (folder / path).is_file():
            return [folder / path]
        found = base.glob(str(path.relative_to(path.anchor)))
        return sorted(each for each in found if each.is_file())
    except (OSError, ValueError, IndexError):  # a NUL, `a**`, or the root itself
        return []


def _images(where: str, folder: Path, named: Any) -> str | None:
    """Return the path of a folder or list of images; `demo` stays, unless a file has that name. Raises UsageError."""
    if named is None or (named == WORD and not (folder / WORD).exists()):
        return named  # type: ignore[no-any-return]
    if not isinstance(named, str) or not named:
        raise UsageError(f"{where} must be a path, got {named!r}")
    if not (folder / named).exists():
        raise UsageError(f"{where}: {folder / named} does not exist", "relative paths start at the sweep's folder")
    return str((folder / named).resolve())


def _more(where: str, table: Any, benches: Sequence[tuple[str, list[Settings]]]) -> dict[str, Any]:
    """Return the further settings of every export: those of the table, and a batch that all measurements have."""
    known = [name for name in DEFAULTS if name not in PLANNED]
    batches = {settings.batch or 1 for _, every in benches for settings in every}
    given = {key.replace("-", "_"): value for key, value in _table(where, table, known, dashes=True).items()}
    return {"batch": "1" if batches <= {1} else "dynamic", **given}


def _bench(where: str, table: Mapping[str, Any]) -> tuple[str, list[Settings]]:
    """Return a board and the settings of all measurements on it. Raises UsageError."""
    values = _table(where, table, BENCH)
    board, limit = values.get("board", HERE), values.get("limit", 60)
    if not isinstance(board, str) or not board or "/" in board or board.startswith("."):
        raise UsageError(f"{where}: board {board!r} must be the name or class of a board, or {HERE}")
    if type(limit) not in (int, float) or not 0 < limit <= MAX_LIMIT_S:
        raise UsageError(f"{where}: limit {limit!r}: use seconds above 0, up to {MAX_LIMIT_S}")
    if type(values.get("end_to_end", False)) is not bool:
        raise UsageError(f"{where}: end_to_end must be true or false")
    one_of(f"{where}: scan", str(values.get("scan", "auto")), ("auto", "plugin", "portable", "bundled"))
    base = Settings(
        scan=values.get("scan", "auto"),
        timed="end-to-end" if values.get("end_to_end") else "model",
        limit_s=float(limit),
    )
    numbers = [_numbers(where, values, key) for key in ("threads", "batch", "streams")]
    return board, [replace(base, threads=t, batch=b, streams=s or 1) for t, b, s in itertools.product(*numbers)]


def _numbers(where: str, values: Mapping[str, Any], key: str) -> Sequence[int | None]:
    """Return the whole numbers of a key, [None] without it. Raises UsageError."""
    found = _list(where, values, key, (int,))
    if any(not 0 < each < 10000 for each in found):
        raise UsageError(f"{where}: {key} {values[key]}: use whole numbers from 1")
    return found or [None]


def _matches(excluded: Mapping[str, Any], checkpoint: Path, form: Form, size: tuple[int, int] | None) -> bool:
    """Test whether a combination is one that the sweep leaves out: all keys of the table match."""
    tests: Mapping[str, Callable[[Any], bool]] = {
        "checkpoint": lambda value: fnmatch.fnmatch(checkpoint.stem, str(value)),
        "form": lambda value: form in parse_forms(str(value)),
        "imgsz": lambda value: size is not None and parse_imgsz(value) == size,
    }
    return bool(excluded) and all(tests[key](value) for key, value in excluded.items())


def _table(where: str, value: Any, known: Sequence[str], dashes: bool = False) -> dict[str, Any]:
    """Return a table whose keys are all known. dashes: keys may have - for _. Raises UsageError."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a table, got {value!r}")
    for key in value:
        one_of(f"{where}: key", key.replace("-", "_") if dashes else key, known)
    return dict(value)


def _list(where: str, content: Mapping[str, Any], key: str, kinds: tuple[type, ...]) -> list[Any]:
    """Return the values of a key, one alone as a list, none without the key. Raises UsageError for other types."""
    value = content.get(key, [])
    values = value if isinstance(value, list) else [value]
    for each in values:
        if type(each) not in kinds:
            raise UsageError(f"{where}: {key}: {each!r} is not possible there", "docs/scale.md shows a sweep")
    return values


def _texts(where: str, content: Mapping[str, Any], key: str) -> list[str]:
    """Return the texts of a key that a sweep must have. Raises UsageError."""
    found = _list(where, content, key, (str,))
    if not found or not all(found):
        raise UsageError(f"{where} has no {key}", "docs/scale.md shows a sweep")
    return found

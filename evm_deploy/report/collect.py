"""Read records and bundles from files and folders, and match them into candidates and groups."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from evm_deploy._util.files import sha256
from evm_deploy.bench.record import MAX_BYTES, Record
from evm_deploy.bundle.archive import SUFFIX as ZIP
from evm_deploy.bundle.bundle import Bundle, open_bundle, refuse_part_of_a_bundle
from evm_deploy.bundle.manifest import FILE, Manifest
from evm_deploy.errors import BundleError, EvmError, UsageError
from evm_deploy.report.candidate import Candidate, Conditions
from evm_deploy.sweep.folder import BUNDLES, PLAN, RECORDS, RunFolder, is_sweep
from evm_deploy.sweep.status import status
from evm_deploy.sweep.tuned import TUNED, Tuned, read_tuned


@dataclass(frozen=True)
class Collected:
    """Records and bundles that were read.

    bundles: by the sha256 of their manifest. ignored: JSON files in the folders that are not records. damaged: error of
    each bundle and record in the folders that cannot be read. sweeps: whether a folder was a sweep's. failed: what
    failed in sweeps, and why. tuned: results of searches.
    """

    records: tuple[Record, ...]
    bundles: dict[str, Bundle]
    ignored: tuple[Path, ...]
    damaged: tuple[EvmError, ...] = ()
    sweeps: bool = False
    failed: tuple[tuple[str, str], ...] = ()
    tuned: tuple[Tuned, ...] = ()


def collect(paths: Iterable[str | Path]) -> Collected:
    """Read records and bundles at `paths`; in a folder also the bundles one level below it, and those of a sweep.

    A damaged bundle or record in a folder does not hide the others. Raises UsageError and BundleError that name the
    file, if it was named itself or if its folder holds nothing else.
    """
    damaged: list[EvmError] = []
    records: list[Record] = []
    bundles: dict[str, Bundle] = {}
    ignored: list[Path] = []
    failed: list[tuple[str, str]] = []
    sweeps, tuned = False, []
    for path in map(Path, paths):
        if path.is_file() and path.suffix == ZIP:
            bundle = open_bundle(path)
            bundles[sha256(bundle.path / FILE)] = bundle
            continue
        if path.is_file():
            refuse_part_of_a_bundle(path)
            records.append(Record.read(path))
            continue
        if not path.is_dir():
            what = "is neither a file nor a folder" if os.path.lexists(path) else "does not exist"
            raise UsageError(f"{path} {what}", "give records of evm-bench, bundles, or folders of them")
        seen, wrong, sweep = 0, len(damaged), is_sweep(path)
        sweeps |= sweep
        if sweep:
            failed += [(title, str(error)) for title, error in status(RunFolder(path)).failed]
            tuned += [found for found in [read_tuned(RunFolder(path))] if found]
        inside = [path, *(each for name in (RECORDS, BUNDLES) if sweep for each in path.glob(f"{name}/*"))]
        for folder in (each for place in inside for each in (place, *sorted(filter(_is_bundle, place.iterdir())))):
            own: set[str] = {PLAN, TUNED} if sweep else set()
            if _is_bundle(folder):
                try:
                    bundle = open_light(folder)
                    bundles[sha256(folder / FILE)] = bundle
                    seen += 1
                except (EvmError, OSError) as error:
                    damaged.append(error if isinstance(error, EvmError) else BundleError(f"{folder}: {error.strerror}"))
                    continue
                own = {FILE, *bundle.manifest.files}
            for file in sorted(folder.glob("*.json")):
                if file.name in own or not file.is_file():
                    continue
                try:
                    if _looks_like_a_record(file):
                        records.append(Record.read(file))
                        seen += 1
                    else:
                        ignored.append(file)
                except UsageError as error:
                    damaged.append(error)
        if not seen and not failed:
            if damaged[wrong:]:
                raise damaged[wrong]
            raise UsageError(
                f"{path} contains no records and no bundles", "evm-bench writes records, evm-export writes bundles"
            )
    return Collected(tuple(records), bundles, tuple(ignored), tuple(damaged), sweeps, tuple(failed), tuple(tuned))


def open_light(path: Path) -> Bundle:
    """Open a bundle without hashing its files, because a report runs nothing. Raises BundleError."""
    bundle = Bundle(path, Manifest.read(path))
    if bundle.size_bytes == 0:
        raise BundleError(f"bundle {path}: {bundle.manifest.artifact} is missing", "copy the whole bundle again")
    return bundle


def newest(records: Iterable[Record]) -> list[Record]:
    """Return the newest record of each bundle, setting and device."""
    latest: dict[tuple[object, ...], Record] = {}
    for record in sorted(records, key=lambda record: record.date):
        latest[identity(record)] = record
    return list(latest.values())


def identity(record: Record) -> tuple[object, ...]:
    """Return a key that is equal for two measurements of the same bundle name, setting and device."""
    candidate = Candidate.of_record(record)
    return (candidate.name, candidate.target, candidate.precision, candidate.variant, candidate.conditions)


def candidates(found: Collected) -> list[Candidate]:
    """Make candidates of the newest records, completed from their bundles, then of the bundles not measured."""
    made = [_joined(record, found.bundles) for record in newest(found.records)]
    measured = {record.bundle.get("manifest_sha256") for record in found.records}
    return made + [Candidate.of_bundle(bundle) for sha, bundle in found.bundles.items() if sha not in measured]


def groups(found: Iterable[Candidate]) -> dict[Conditions, list[Candidate]]:
    """Group candidates by conditions, fastest first in each group; candidates without a measurement come last."""
    grouped: dict[Conditions, list[Candidate]] = {}
    for each in sorted(found, key=lambda each: (each.p50 is None, each.p50 or each.size_bytes, each.label)):
        grouped.setdefault(each.conditions, []).append(each)
    return dict(sorted(grouped.items(), key=lambda item: (item[0].device is None, str(item[0]), item[0].device or ())))


def _joined(record: Record, bundles: dict[str, Bundle]) -> Candidate:
    """Make the candidate of a record, with the rejection of its bundle, or a note if the bundle has changed."""
    candidate = Candidate.of_record(record)
    bundle = bundles.get(record.bundle.get("manifest_sha256") or "")
    if bundle:
        return replace(candidate, rejected=Candidate.of_bundle(bundle).rejected)
    if any(other.path.resolve().name == candidate.name for other in bundles.values()):
        note = "the record belongs to another export of this bundle: measure again"
        return replace(candidate, notes=(*candidate.notes, note))
    return candidate


def _is_bundle(path: Path) -> bool:
    """Test whether the folder `path` has a manifest. False for a folder of another user, such as lost+found."""
    try:
        return (path / FILE).is_file()
    except OSError:
        return False


def _looks_like_a_record(path: Path) -> bool:
    """Test whether a JSON file has samples, or is damaged, so that reading it explains the damage."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return False
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return True  # Record.read then raises an error that says what is wrong
    return isinstance(content, dict) and "samples_ms" in content

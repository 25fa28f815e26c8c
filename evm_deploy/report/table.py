"""Columns and rows of a group's table, shared by terminal, Markdown, CSV, JSON and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evm_deploy.bench.text import format_parts
from evm_deploy.report.candidate import Candidate, device_name, finite, milliseconds
from evm_deploy.report.collect import groups
from evm_deploy.report.verdict import MAX_DROP, Verdict, differ, speed, verdict
from evm_deploy.tasks import TITLES

MB = 1e6  # bytes
SUMS = (0.85, 1.05)  # normal range of the sum of the times by layer, relative to the time of an inference


@dataclass(frozen=True)
class Group:
    """Candidates that may be compared, and the verdict on them.

    title: the conditions as text. device: name of the device; empty if nothing was measured.
    """

    title: str
    device: str
    candidates: tuple[Candidate, ...]
    verdict: Verdict

    @property
    def measured(self) -> tuple[Candidate, ...]:
        """Candidates that were measured."""
        return tuple(each for each in self.candidates if each.record)

    @property
    def metric(self) -> str:
        """Title of the main figure of the evaluated candidates, such as `top-1`; `accuracy` if they have several."""
        found = {each.metric for each in self.candidates if each.drop is not None and each.accuracy}
        return found.pop() if len(found) == 1 else "accuracy"

    def figure(self, each: Candidate, name: str) -> float | None:
        """Return a figure of a candidate in percent. A float candidate without its own gets the float model's.

        None if it is not known, and for the float model if the evaluated candidates do not state the same value.
        """
        own = each.figure(name)
        if own is not None or not each.is_float:
            return own
        found = {other.figure(f"{name}_float") for other in self.candidates} - {None}
        return found.pop() if len(found) == 1 else None


def grouped(candidates: Sequence[Candidate], max_drop: float = MAX_DROP) -> list[Group]:
    """Group candidates by conditions and give each group its verdict. max_drop: accepted drop of the
    main figure in points."""
    return [
        Group(
            str(conditions),
            device_name(conditions.device) if conditions.device else "",
            tuple(members),
            verdict(members, max_drop),
        )
        for conditions, members in groups(candidates).items()
    ]


def latency(each: Candidate) -> str:
    """Format the median: `0.257 ms`, with NOT STABLE if it was not stable; empty if not measured."""
    return "" if each.p50 is None else f"{milliseconds(each.p50)} ms" + ("" if each.stable else " NOT STABLE")


def interval(each: Candidate) -> str:
    """Format the 95 % interval of the median in ms: `0.251-0.262`."""
    return "" if each.interval is None else "-".join(map(milliseconds, each.interval))


def ratio(each: Candidate, group: Group) -> str:
    """Format the speed relative to the baseline: `1.70x`; with `~` in front if the intervals overlap."""
    baseline = group.verdict.baseline
    if each.record is None or baseline is None:
        return ""
    if each is baseline:
        return "baseline"
    return f"{'' if differ(each, baseline) else '~'}{speed(each, baseline):.2f}x"


def p99(each: Candidate) -> str:
    """Format the 99th percentile: `0.367 ms`."""
    return f"{milliseconds(each.record.summary_ms['p99'])} ms" if each.record else ""


def figure(name: str) -> Callable[[Candidate, Group], str]:
    """Return a function that formats the figure `name` of a task's score in percent: `99.30 %`."""

    def show(each: Candidate, group: Group) -> str:
        share = group.figure(each, name)
        return "" if share is None else f"{share:.2f} %"

    return show


def points(each: Candidate) -> str:
    """Format the difference of the main figure to the float model in points, or the SQNR if there is no such figure."""
    if each.accuracy is None:
        return "float" if each.is_float else "unknown"
    if each.drop is None:
        sqnr = each.accuracy.get("sqnr_db")
        return f"SQNR {sqnr:.1f} dB" if sqnr is not None else "unknown"
    return f"{-each.drop + 0.0:+.2f}"


def size(each: Candidate) -> str:
    """Format the size of the artifact: `1.38 MB`."""
    return f"{each.size_bytes / MB:.2f} MB" if each.size_bytes else ""


def load(each: Candidate) -> str:
    """Format the load time in a new process: `312 ms`."""
    return _of(each, "load_ms", "fresh", "{:.0f} ms")


def memory(each: Candidate) -> str:
    """Format the peak memory: `75 MB`."""
    return _of(each, "memory_mb", "peak", "{:.0f} MB")


def scan(each: Candidate) -> str:
    """Format the share of the scans in the time of all layers: `19 %`."""
    return "" if each.scan_share is None else f"{each.scan_share:.0f} %"


def energy(each: Candidate) -> str:
    """Format the energy of one inference by sensor: `12.3 mJ rapl package-0`."""
    parts = each.record.energy_mj if each.record else {}
    return ", ".join(f"{value:.3g} mJ {sensor}" for sensor, value in parts.items())


COLUMNS: tuple[tuple[str, Callable[[Candidate, Group], str]], ...] = (
    ("candidate", lambda each, _: each.label),
    ("p50", lambda each, _: latency(each)),
    ("95 % interval", lambda each, _: interval(each)),
    ("speed", ratio),
    ("p99", lambda each, _: p99(each)),
    *((title, figure(name)) for name, title in TITLES.items()),
    ("to float", lambda each, _: points(each)),
    ("size", lambda each, _: size(each)),
    ("load", lambda each, _: load(each)),
    ("memory", lambda each, _: memory(each)),
    ("scan", lambda each, _: scan(each)),
    ("energy", lambda each, _: energy(each)),
)


@dataclass(frozen=True)
class Row:
    """Row of a table: the candidate and the text of its cells."""

    candidate: Candidate
    cells: list[str]


def filled(group: Group) -> tuple[list[str], list[Row]]:
    """Return headings and rows of the group's table, without empty columns."""
    rows = [[show(each, group) for _, show in COLUMNS] for each in group.candidates]
    kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in rows)]
    made = [Row(each, [row[i] for i in kept]) for each, row in zip(group.candidates, rows, strict=True)]
    return [COLUMNS[i][0] for i in kept], made


def remarks(group: Group) -> list[str]:
    """Return the notes of the verdict, then those of the candidates."""
    own = [f"{each.label}: {note}" for each in group.candidates for note in (*each.notes, *doubts(each))]
    return [*group.verdict.notes, *own]


def doubts(each: Candidate) -> list[str]:
    """Return a warning if the sum of the times by layer is far from the time of an inference.

    Profilers take time themselves, and most in relation to small networks.
    """
    of_inference = finite(each.record.layers.get("of_inference")) if each.record else None
    if of_inference is None or SUMS[0] <= of_inference <= SUMS[1]:
        return []
    return [f"the times by layer add up to {100 * of_inference:.0f} % of an inference: only use their shares"]


def facts(each: Candidate, group: Group) -> dict[str, Any]:
    """Return the numbers of one candidate for CSV and JSON; unknown values are None."""
    record, verdict = each.record, group.verdict
    low, high = each.interval or (None, None)
    compared = record is not None and verdict.baseline is not None
    return {
        "group": group.title,
        "device": group.device,
        "name": each.name,
        "model": each.model,
        "target": each.target,
        "precision": each.precision,
        "settings": ", ".join(each.variant),
        "shipped": each is verdict.ship,
        "p50_ms": each.p50,
        "low_ms": low,
        "high_ms": high,
        "p99_ms": record.summary_ms["p99"] if record else None,
        "speed": round(speed(each, verdict.baseline), 4) if compared and verdict.baseline else None,
        "stable": each.stable if record else None,
        "throughput": record.throughput if record else None,
        **{f"{name}_percent": each.figure(name) for name in TITLES},
        "drop_points": each.drop,
        "sqnr_db": (each.accuracy or {}).get("sqnr_db"),
        "size_bytes": each.size_bytes,
        "load_ms": record.load_ms.get("fresh") if record else None,
        "peak_mb": record.memory_mb.get("peak") if record else None,
        "scan_share_percent": each.scan_share,
        "energy": format_parts(record.energy_mj, "mJ") if record else "",
        "date": record.date if record else None,
        "notes": "; ".join(each.notes),
    }


def _of(each: Candidate, times: str, key: str, form: str) -> str:
    """Format the value `key` of the record's field `times` with `form`; empty if there is no value."""
    value = getattr(each.record, times).get(key) if each.record else None
    return form.format(value) if value else ""

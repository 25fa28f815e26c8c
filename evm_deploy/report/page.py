"""HTML page of a report: one file without scripts, fonts or links. jinja2 escapes all text from records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evm_deploy import __version__
from evm_deploy.bench.measurable import TORCH
from evm_deploy.bench.text import scan_form
from evm_deploy.report.candidate import Candidate, finite, milliseconds, plain
from evm_deploy.report.overview import Overview
from evm_deploy.report.scatter import Point, scatter
from evm_deploy.report.svg import Bar, Stack, bars, stacks
from evm_deploy.report.table import Group, Row, filled, latency, remarks, scan, size
from evm_deploy.tasks import TITLES

HERE = Path(__file__).parent
COLOURS = 8  # colours for kinds of layers; all kinds after the seventh share the last colour
CUT = 2.0  # a bar longer than this many times the slowest bundle's is cut off
MODULES = 12  # number of slowest modules shown for each candidate


@dataclass(frozen=True)
class Figure:
    """Chart of the page. caption: explanation below the chart. legend: pairs of CSS class and text."""

    title: str
    caption: str
    image: Markup
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """Contents of the page for one group, as the template needs them."""

    group: Group
    headings: list[str]
    rows: list[Row]
    figures: list[Figure]
    modules: list[tuple[str, list[dict[str, Any]]]]
    device: list[tuple[str, str]]
    measured: list[tuple[str, str]]
    notes: list[str]


def page(groups: Sequence[Group], seen: Overview | None = None) -> str:
    """Return the HTML page for `groups`. With their overview, the page begins with it, and the groups are folded."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    dates = sorted(each.record.date[:10] for group in groups for each in group.candidates if each.record)
    environment.filters["sentence"] = lambda text: f"{text[:1].upper()}{text[1:]}."
    return environment.get_template("page.html.jinja").render(
        sections=[section(group, whole=seen is None) for group in groups],
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        dates=[plain(date) for date in dict.fromkeys((dates[0], dates[-1]))] if dates else [],
        version=__version__,
        seen=seen,
    )


def section(group: Group, whole: bool = True) -> Section:
    """Make the section of one group: table, device and notes, and charts and slowest modules of the `whole` section."""
    headings, rows = filled(group)
    figures = [
        latency_figure(group),
        accuracy_figure(group),
        layers_figure(group),
        size_figure(group),
    ]
    return Section(
        group,
        headings,
        rows,
        [figure for figure in figures if figure and whole],
        [(each.label, slowest(each)) for each in group.measured if whole and each.record and each.record.layers],
        device_facts(group),
        how_measured(group),
        remarks(group),
    )


def mark(each: Candidate, group: Group) -> str:
    """Return the CSS class of a candidate: `ship` for the recommended one, `unstable`, or empty."""
    if each is group.verdict.ship:
        return "ship"
    return "" if each.stable else "unstable"


def latency_figure(group: Group) -> Figure | None:
    """Draw the medians as bars, or None if nothing was measured. The bar of a far slower torch baseline is cut off."""
    if not group.measured:
        return None
    rows = {
        id(each): Bar(each.label, each.p50 or 0, latency(each), mark(each, group), *(each.interval or (None, None)))
        for each in group.measured
    }
    caption, baseline = "Median of one inference. Whiskers: 95 % confidence interval.", group.verdict.baseline
    if baseline and len(rows) > 1:
        caption += f" Dashed line: {baseline.label}."
    longest = max((each.interval[1] for each in group.measured if each.interval and each.target != TORCH), default=None)
    cut = longest is not None and any(row.value > CUT * longest for row in rows.values())
    if cut:
        caption += " A bar with a gap is cut off."
    reference = rows[id(baseline)] if baseline and len(rows) > 1 else None
    return Figure("Latency", caption, bars("Latency", list(rows.values()), reference, longest if cut else None))


def accuracy_figure(group: Group) -> Figure | None:
    """Draw accuracy against latency of the bundles, or None if fewer than two have a known accuracy.

    The accuracy is the task's main figure if it is known for all of them, else the difference to the float model. The
    torch baseline is left out: its latency would compress the scale.
    """
    known = [each for each in group.measured if each.drop is not None and each.target != TORCH]
    if len(known) < 2 or all(each.accuracy is None for each in known):
        return None
    name = next((name for name, title in TITLES.items() if title == group.metric), "")
    shares = {id(each): group.figure(each, name) for each in known}
    absolute = None not in shares.values()
    heights = {id(each): shares[id(each)] if absolute else -(each.drop or 0.0) for each in known}
    points = [
        Point(each.label, each.p50 or 0.0, heights[id(each)] or 0.0, each.interval or (0.0, 0.0), mark(each, group))
        for each in sorted(known, key=lambda each: each is group.verdict.ship)  # drawn last, so on top
    ]
    title, y_name, most = "Accuracy against latency", f"{group.metric}, %", 100.0
    if not absolute:
        y_name, most = f"{group.metric} against float, points", max(point.y for point in points) + 0.1
    return Figure(title, "Further up and to the left is better.", scatter(title, points, "p50, ms", y_name, most))


def layers_figure(group: Group) -> Figure | None:
    """Draw the time by kind of layer as stacked bars, the scan first; None if no candidate was profiled."""
    profiled = [each for each in group.measured if each.record and each.record.layers.get("kinds")]
    if not profiled:
        return None
    kinds = {id(each): each.record.layers["kinds"] for each in profiled if each.record}
    total: dict[str, float] = {}
    for parts in kinds.values():
        for kind, ms in parts.items():
            total[kind] = total.get(kind, 0.0) + ms
    order = sorted(total, key=lambda kind: (kind != "scan", -total[kind]))
    colour = {kind: f"k{min(i, COLOURS - 1)}" for i, kind in enumerate(order)}
    rows = [
        Stack(
            each.label,
            f"{milliseconds(sum(kinds[id(each)].values()))} ms" + (f", scan {scan(each)}" if scan(each) else ""),
            tuple((colour[kind], kinds[id(each)][kind]) for kind in order if kind in kinds[id(each)]),
        )
        for each in profiled
    ]
    legend = [(colour[kind], plain(kind)) for kind in order[: COLOURS - 1]]
    legend += [(f"k{COLOURS - 1}", "other")] if len(order) >= COLOURS else []
    how = ", ".join(dict.fromkeys(plain(each.record.layers["how"]) for each in profiled if each.record))
    return Figure("Time by kind of layer", f"Source: {how}.", stacks("Time by kind of layer", rows), tuple(legend))


def size_figure(group: Group) -> Figure | None:
    """Draw the sizes of the artifacts as bars, or None if no size is known."""
    rows = [
        Bar(each.label, each.size_bytes, size(each), mark(each, group)) for each in group.candidates if each.size_bytes
    ]
    return Figure("Size", "The artifact with its weights.", bars("Size", rows)) if rows else None


def slowest(each: Candidate) -> list[dict[str, Any]]:
    """Return the slowest modules of a measured candidate, each with its share of the time of all modules in percent."""
    assert each.record
    modules = sorted(each.record.layers["modules"], key=lambda module: -module["ms"])
    total = sum(module["ms"] for module in modules) or 1.0
    return [
        {
            **{key: plain(module[key]) for key in ("module", "kind")},
            "ms": module["ms"],
            "share": 100 * module["ms"] / total,
        }
        for module in modules[:MODULES]
    ]


def device_facts(group: Group) -> list[tuple[str, str]]:
    """Return names and values of the device's facts, from the newest record."""
    if not group.measured:
        return []
    record = max((each.record for each in group.measured if each.record), key=lambda record: record.date)
    device, names = (
        record.device,
        {"memory_mb": "memory, MB", "runs_on": "runs on", "usable_cores": "usable cores", "at": "at"},
    )
    order = (
        "model",
        "at",
        "profile",
        "cpu",
        "runs_on",
        "machine",
        "cores",
        "usable_cores",
        "memory_mb",
        "governor",
        "system",
        "python",
    )
    facts = [(names.get(key, key), plain(device[key])) for key in order if device.get(key) not in (None, "")]
    load = finite(record.before.get("load"))
    return facts + ([("load before, per core", f"{load:.2f}")] if load is not None else [])


def how_measured(group: Group) -> list[tuple[str, str]]:
    """Return for each measured candidate its label and a text: runs, warm-up, versions, form of the scan, date."""
    rows = []
    for each in group.measured:
        assert each.record
        record, versions = each.record, each.record.runtime["versions"]
        said = (
            f"{len(record.samples_ms)} runs after {record.warm_up} of warm-up",
            ", ".join(f"{package} {version}" for package, version in versions.items()),
            f"scan {scan_form(record)}",
            record.date,
        )
        rows.append((each.label, "; ".join(plain(part) for part in said if part)))
    return rows

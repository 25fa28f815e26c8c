"""Reports, comparisons and histories as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from evm_deploy.report.candidate import Candidate, device_name, milliseconds
from evm_deploy.report.compare import Comparison, Pair
from evm_deploy.report.history import steps
from evm_deploy.report.overview import Cell, Overview
from evm_deploy.report.table import Group, filled, interval, latency, remarks

if TYPE_CHECKING:
    from rich.console import Console

BARS = "▁▂▃▄▅▆▇█"
VERDICTS = {"regression": "red", "improvement": "green", "same": ""}


def show_report(console: Console, groups: Sequence[Group], seen: Overview | None) -> None:
    """Print all groups, or the overview and the verdict of each group."""
    if seen is None:
        show_groups(console, groups)
        return
    for front in seen.searches:
        console.print(f"Tuned    {front.board}", style="bold")
        for line in front.lines:
            console.print(f"         {line}")
        console.print()
    _table(
        console,
        ["p50, ms", "accuracy", *seen.boards],
        ([each.label, each.figure, *(_heat(cell) for cell in each.cells)] for each in seen.lines),
    )
    console.print("* on the front: no other candidate is faster and as accurate\n" if seen.fronts else "")
    for group in groups:
        console.print(f"{group.title}{f' on {group.device}' if group.device else ''}", style="dim")
        console.print(f"Verdict  {group.verdict.sentence}", style="bold green" if group.verdict.ship else "bold yellow")
    for what, why in seen.failed:
        console.print(f"Failed   {what}: {why}", style="red")


def _heat(cell: Cell | None) -> str:
    return "" if cell is None else f"{'*' if cell.front else ''}{cell.text}"


def show_groups(console: Console, groups: Sequence[Group]) -> None:
    """Print title, device, table, verdict and notes of each group."""
    for group in groups:
        headings, rows = filled(group)
        console.print(group.title, style="bold")
        if group.device:
            console.print(group.device, style="dim")
        _table(console, headings, (row.cells for row in rows))
        console.print(f"Verdict  {group.verdict.sentence}", style="bold green" if group.verdict.ship else "bold yellow")
        for text in remarks(group):
            console.print(f"Note     {text}")
        console.print()


def show_comparison(console: Console, comparison: Comparison) -> None:
    """Print a table of all pairs, and the records without a counterpart."""
    rows = [
        [
            pair.label,
            str(pair.conditions),
            f"{milliseconds(pair.old.p50 or 0.0)} ms",
            f"{milliseconds(pair.new.p50 or 0.0)} ms",
            *_change(pair),
        ]
        for pair in comparison.pairs
    ]
    _table(console, ["bundle", "conditions", "old", "new", "time", "interval", "verdict"], rows)
    for text in dict.fromkeys(change for pair in comparison.pairs for change in pair.changes):
        console.print(f"Note     changed between OLD and NEW: {text}")
    for text in comparison.unmatched:
        console.print(f"Note     {text}")


def show_history(console: Console, courses: Sequence[list[Candidate]]) -> None:
    """Print a table for each bundle, setting and device."""
    for course in courses:
        last = course[-1]
        console.print(f"{last.name} ({last.label})  {last.conditions}", style="bold")
        console.print(f"{device_name(last.conditions.device or ())}  {sparkline([each.p50 or 0 for each in course])}")
        rows = [
            [
                each.record.date if each.record else "",
                latency(each),
                interval(each),
                *(_change(pair) if pair else [""] * 3),
            ]
            for each, pair in zip(course, steps(course), strict=True)
        ]
        _table(console, ["date", "p50", "95 % interval", "time", "interval", "verdict"], rows)
        console.print()


def sparkline(values: Sequence[float]) -> str:
    """Return one block character for each value; its height runs from the smallest to the largest value."""
    low, high = min(values), max(values)
    return "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in values)


def _change(pair: Pair) -> list[str]:
    """Return the cells of a change: ratio of the times, interval of the ratio, verdict."""
    low, high = pair.interval
    unstable = "" if pair.stable else ", NOT STABLE"
    return [f"{pair.ratio:.2f}x", f"{low:.2f}-{high:.2f}", f"{pair.verdict}{unstable}"]


def _table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table without lines, the first column aligned left and the others right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    console.print(table)


def _style(cell: str) -> str:
    """Return rich's style for a cell: the colour of a verdict, yellow for an unstable measurement."""
    return VERDICTS.get(cell, "yellow" if "NOT STABLE" in cell else "")

"""Overview of many groups: latencies of all candidates on all boards, the front of each board, and what failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evm_deploy._util.text import count_text
from evm_deploy.bench.record import Record
from evm_deploy.report.candidate import Candidate, device_key, milliseconds, plain
from evm_deploy.report.table import Group
from evm_deploy.sweep.tuned import Tuned
from evm_deploy.tasks import TITLES

SHADES = 7  # of a heat map, 0 for the fastest
MANY = 8  # groups from which a report begins with an overview


@dataclass(frozen=True)
class Cell:
    """Median of a candidate on a board. shade: 0 for the fastest of the board to SHADES - 1. front: on its front."""

    text: str
    shade: int
    front: bool


@dataclass(frozen=True)
class Line:
    """Row of the matrix: a candidate and its main figure as text, and its cell for each board, None if not measured."""

    label: str
    figure: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Front:
    """Candidates of a board that no other one beats in both latency and main figure, the fastest first, as texts."""

    board: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Overview:
    """Matrix of candidates and boards. boards: titles of the columns. failed: what failed and why.

    searches: the front of each search within its budget, the chosen candidate first.
    """

    boards: tuple[str, ...]
    lines: tuple[Line, ...]
    fronts: tuple[Front, ...]
    failed: tuple[tuple[str, str], ...]
    searches: tuple[Front, ...] = ()


@dataclass(frozen=True)
class _Measured:
    """Candidate with its median in ms and its main figure in percent, None if it is not known."""

    candidate: Candidate
    p50: float
    figure: float | None

    def beaten(self, others: Sequence[_Measured]) -> bool:
        """Test whether another candidate is at least as good in both, and better in one."""
        mine = (-self.p50, self.figure or 0.0)
        theirs = [(-other.p50, other.figure or 0.0) for other in others if other.figure is not None]
        return any(a >= mine[0] and b >= mine[1] and (a, b) != mine for a, b in theirs)


def overview(groups: Sequence[Group], failed: Sequence[tuple[str, str]], tuned: Sequence[Tuned] = ()) -> Overview:
    """Return the overview of all groups, and of searches."""
    columns: dict[tuple[object, ...], dict[str, _Measured]] = {}
    figures: dict[str, float] = {}
    for group in groups:
        for each in group.candidates:
            share = group.figure(each, _metric(group))
            if share is not None:
                figures[_label(each)] = share
            if each.record and each.p50 is not None:
                columns.setdefault(_column(each.record), {})[_label(each)] = _Measured(each, each.p50, share)
    keys = sorted(columns, key=str)
    titles = _distinct([_title(next(iter(columns[key].values())).candidate.record) for key in keys])
    labels = sorted({label for found in columns.values() for label in found})
    on_front = {key: _front(list(columns[key].values())) for key in keys}
    lines = [
        Line(
            label,
            f"{figures[label]:.2f} %" if label in figures else "",
            tuple(_cell(columns[key], label, on_front[key]) for key in keys),
        )
        for label in labels
    ]
    fronts = [
        Front(title, tuple(_said(each) for each in on_front[key])) for key, title in zip(keys, titles, strict=True)
    ]
    texts = tuple((plain(what), plain(why.replace("\n  ", "; "))) for what, why in failed)
    searches = tuple(_search(each) for each in tuned)
    return Overview(tuple(titles), tuple(lines), tuple(each for each in fronts if each.lines), texts, searches)


def _search(tuned: Tuned) -> Front:
    """Return the front of a search, or the candidate that came nearest to its budget."""
    title = plain(f"{tuned.budget} on {tuned.board}, {count_text(len(tuned.trials), 'trial')}")
    if tuned.front:
        lines = [f"{each.text(tuned.budget)}   {each.choice}" for each in tuned.front]
        return Front(title, (f"chosen: {plain(lines[0])}", *map(plain, lines[1:])))
    near = tuned.nearest
    return Front(
        title,
        ("nothing fits the budget", *([plain(f"nearest: {near.text(tuned.budget)}   {near.choice}")] if near else [])),
    )


def _metric(group: Group) -> str:
    """Return the name of the main figure of a group, empty without one."""
    return next((name for name, title in TITLES.items() if title == group.metric), "")


def _label(each: Candidate) -> str:
    """Return what tells a candidate apart on a board: model, target, precision, settings and size."""
    return f"{each.model} {each.label}, {each.imgsz[0]}x{each.imgsz[1]}"


def _column(record: Record) -> tuple[object, ...]:
    """Return the device and the settings that latencies of a column share."""
    settings = record.settings
    return (*device_key(record), *(settings.get(key) for key in ("batch", "threads", "streams", "timed")))


def _title(record: Record | None) -> str:
    """Return the title of a column: address or profile of the board, else its model, and threads and batch."""
    assert record
    device, settings = record.device, record.settings
    name = device.get("at") or device.get("profile") or device.get("model") or device.get("cpu") or "board"
    threads = settings.get("threads")
    return plain(f"{name}, {f't{threads}' if threads else 'auto'} b{settings['batch']}")


def _distinct(titles: Sequence[str]) -> list[str]:
    """Return the titles with a number behind those that occur before."""
    return [title if titles.index(title) == i else f"{title} ({i + 1})" for i, title in enumerate(titles)]


def _front(found: list[_Measured]) -> list[_Measured]:
    """Return those that no other one beats in both latency and main figure, the fastest first."""
    known = [each for each in found if each.figure is not None]
    return sorted((each for each in known if not each.beaten(known)), key=lambda each: each.p50)


def _cell(column: dict[str, _Measured], label: str, front: Sequence[_Measured]) -> Cell | None:
    """Return the cell of a candidate; its shade is by the logarithm of the latency, within the column."""
    each = column.get(label)
    if each is None:
        return None
    low, high = (math.log(pick(other.p50 for other in column.values()) or 1e-9) for pick in (min, max))
    share = (math.log(each.p50 or 1e-9) - low) / (high - low) if high > low else 0.0
    return Cell(milliseconds(each.p50), round(share * (SHADES - 1)), each in front)


def _said(each: _Measured) -> str:
    """Return a line for a candidate on the front."""
    return f"{milliseconds(each.p50)} ms  {each.figure:.2f} %  {_label(each.candidate)}"

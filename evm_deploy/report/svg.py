"""SVG elements, escaped, and the charts that are made of bars.

Coordinates along x are percentages and along y pixels: a chart takes the width of its place, on a phone too, and its
text keeps its size. Colours are classes; the page's style sheet has them for light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

ROW = 44  # px for one bar and the line of text above it
BAR = 14
TEXT = 14  # px from the top of a row to its text's baseline


@dataclass(frozen=True)
class Bar:
    """value: in the chart's unit; shown: in words. low, high: its interval, if it has one. mark: CSS class."""

    label: str
    value: float
    shown: str
    mark: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Stack:
    """A bar of parts (class, value), one after the other."""

    label: str
    shown: str
    parts: tuple[tuple[str, float], ...]


def element(name: str, *children: str, **attributes: object) -> Markup:
    """`<name key="value">children</name>`; `class_` is class, other underscores are hyphens. Everything is escaped."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


def chart(title: str, description: str, height: float, children: Iterable[Markup]) -> Markup:
    """An image with a name and a description for those who do not see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        role="img",
        aria_label=f"{title}. {description}",
        width="100%",
        height=f"{height:g}",
    )


def text(x: float, y: float, words: str, class_: str = "", anchor: str = "start") -> Markup:
    return element("text", words, x=_percent(x), y=f"{y:g}", class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=_percent(x1), y1=f"{y1:g}", x2=_percent(x2), y2=f"{y2:g}", class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str, hint: str = "") -> Markup:
    """hint: what a pointer on it shows."""
    children = (element("title", hint),) if hint else ()
    return element(
        "rect",
        *children,
        x=_percent(x),
        y=f"{y:g}",
        width=_percent(width),
        height=f"{height:g}",
        class_=class_,
    )


def bars(title: str, rows: Sequence[Bar], reference: Bar | None = None, full: float | None = None) -> Markup:
    """Horizontal bars from zero, with whiskers for intervals, and a line down from the end of the reference.

    full: the value of a whole bar, by default the largest; a longer bar is cut off, and shows it.
    """
    longest = max([row.high or row.value for row in rows if row.value] or [1.0])
    full = full or longest
    drawn: list[Markup] = []
    for i, row in enumerate(rows):
        top, width = i * ROW + TEXT + 7, min(100 * row.value / full, 100.0)
        drawn += [
            text(0, i * ROW + TEXT, row.label, f"label {row.mark}"),
            text(100, i * ROW + TEXT, row.shown, f"value {row.mark}", "end"),
            rectangle(0, top, 100, BAR, "track"),
            rectangle(0, top, width, BAR, f"bar {row.mark}", f"{row.label}: {row.shown}"),
        ]
        if row.value > full:
            drawn += [rectangle(at, top - 1, 0.8, BAR + 2, "cut") for at in (93, 95)]
        elif row.low is not None and row.high is not None:
            ends = [100 * end / full for end in (row.low, row.high)]
            drawn += [line(ends[0], top + BAR / 2, ends[1], top + BAR / 2, "whisker")]
            drawn += [line(end, top + BAR / 2 - 4, end, top + BAR / 2 + 4, "whisker") for end in ends]
    if reference and 0 < reference.value <= full:
        at = 100 * reference.value / full
        drawn.append(line(at, TEXT + 4, at, len(rows) * ROW - 4, "reference"))
    said = "; ".join(f"{row.label}: {row.shown}" for row in rows)
    return chart(title, said, len(rows) * ROW, drawn)


def stacks(title: str, rows: Sequence[Stack]) -> Markup:
    """Horizontal bars of parts, all on one scale."""
    longest = max([sum(value for _, value in row.parts) for row in rows] or [1.0]) or 1.0
    drawn: list[Markup] = []
    for i, row in enumerate(rows):
        top, at = i * ROW, 0.0
        drawn += [text(0, top + TEXT, row.label, "label"), text(100, top + TEXT, row.shown, "value", "end")]
        drawn.append(rectangle(0, top + TEXT + 7, 100, BAR, "track"))
        for class_, value in row.parts:
            width = 100 * value / longest
            drawn.append(rectangle(at, top + TEXT + 7, width, BAR, f"part {class_}", f"{value:.3g} ms"))
            at += width
    said = "; ".join(f"{row.label}: {row.shown}" for row in rows)
    return chart(title, said, len(rows) * ROW, drawn)


def _percent(value: float) -> str:
    return f"{value:.2f}%"

"""SVG elements, with all text escaped, and bar charts.

x coordinates are percentages and y coordinates are pixels: a chart fills the available width and its text keeps its
size. Colours are CSS classes; page.css defines them for light and dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

ROW = 44  # px: height of one bar and the line of text above it
BAR = 14  # px: height of a bar
TEXT = 14  # px from the top of a row to its text's baseline


@dataclass(frozen=True)
class Bar:
    """Bar of a chart. value: in the chart's unit. shown: text of the value. low, high: interval, if there is one.

    mark: CSS class.
    """

    label: str
    value: float
    shown: str
    mark: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Stack:
    """Stacked bar. shown: text of the whole value. parts: pairs of CSS class and value."""

    label: str
    shown: str
    parts: tuple[tuple[str, float], ...]


def element(name: str, *children: str, **attributes: object) -> Markup:
    """Return `<name key="value">children</name>` with everything escaped.

    The attribute `class_` becomes `class`; other underscores become hyphens.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


def chart(title: str, description: str, height: float, children: Iterable[Markup]) -> Markup:
    """Return an SVG image with a title and a description for screen readers. height: in px."""
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
    """Return a text element. x: percent, y: px of the baseline, anchor: start, middle or end."""
    return element("text", words, x=_percent(x), y=f"{y:g}", class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a line element. x1, x2: percent. y1, y2: px."""
    return element("line", x1=_percent(x1), y1=f"{y1:g}", x2=_percent(x2), y2=f"{y2:g}", class_=class_)


def rectangle(x: float, y: float, width: float, height: float, class_: str, hint: str = "") -> Markup:
    """Return a rectangle element. x, width: percent. y, height: px. hint: tooltip."""
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
    """Draw horizontal bars from zero, with whiskers for intervals, and a vertical line at the value of `reference`.

    full: value of a bar of full width, by default the largest value; a longer bar is cut off and drawn with a gap.
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
    """Draw horizontal stacked bars, all on the same scale."""
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
    """Format a percentage for SVG."""
    return f"{value:.2f}%"

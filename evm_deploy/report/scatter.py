"""Accuracy against latency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from evm_deploy.report.svg import chart, element, line, text

HEIGHT = 300
TOP, BOTTOM = 24, 256  # px: where the highest and the lowest values are drawn
LEFT, RIGHT = 14.0, 96.0  # percent
APART = 17  # px between labels


@dataclass(frozen=True)
class Point:
    """x in ms, y in percent or points. interval: of x."""

    label: str
    x: float
    y: float
    interval: tuple[float, float]
    mark: str = ""


def scatter(title: str, points: Sequence[Point], x_name: str, y_name: str) -> Markup:
    """Points with whiskers along x; further up and left is better. x begins at zero."""
    x_ticks = ticks(0.0, max(point.interval[1] for point in points) * 1.05)
    low, high = min(point.y for point in points), max(point.y for point in points)
    margin = max((high - low) * 0.25, 0.1)
    y_ticks = ticks(low - margin, high + margin)

    def x_of(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / x_ticks[-1]

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    drawn = [line(LEFT, y_of(tick), RIGHT, y_of(tick), "grid") for tick in y_ticks]
    drawn += [text(LEFT - 1.5, y_of(tick) + 4, _short(tick), "tick", "end") for tick in y_ticks]
    drawn += [text(x_of(tick), BOTTOM + 20, _short(tick), "tick", "middle") for tick in x_ticks]
    drawn += [text(0, 12, y_name, "axis"), text(RIGHT, HEIGHT - 6, x_name, "axis", "end")]
    for point, label_y in zip(points, _spread([y_of(point.y) for point in points]), strict=True):
        x, y = x_of(point.x), y_of(point.y)
        drawn.append(line(x_of(point.interval[0]), y, x_of(point.interval[1]), y, "whisker"))
        drawn.append(
            element(
                "circle", element("title", point.label), cx=f"{x:.2f}%", cy=f"{y:g}", r=6, class_=f"point {point.mark}"
            )
        )
        drawn.append(_label(x, label_y, point))
    said = "; ".join(f"{point.label}: {point.x:.3g} ms, {point.y:.2f}" for point in points)
    return chart(title, said, HEIGHT, drawn)


def ticks(low: float, high: float) -> list[float]:
    """Round values, 1, 2 or 5 times a power of ten apart, around low and high; about four."""
    raw = max((high - low) / 4, 1e-9)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _label(x: float, y: float, point: Point) -> Markup:
    """Beside its point: on the side that has more room."""
    left = x > (LEFT + RIGHT) / 2
    shift = -11 if left else 11
    return element(
        "text",
        point.label,
        x=f"{x:.2f}%",
        y=f"{y + 4:g}",
        dx=shift,
        class_=f"label {point.mark}",
        text_anchor="end" if left else "start",
    )


def _spread(heights: Sequence[float]) -> list[float]:
    """Heights of labels, moved down until none covers another."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda i: placed[i])
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + APART)
    return placed


def _short(value: float) -> str:
    return f"{value + 0.0:.6g}"

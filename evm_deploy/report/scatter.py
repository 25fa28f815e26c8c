"""Scatter chart of accuracy against latency, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from evm_deploy.report.svg import chart, element, line, text

HEIGHT = 300  # px
TOP, BOTTOM = 48, 256  # px: y of the highest and the lowest value
AXIS = 15  # px: height of the y axis's name
LEFT, RIGHT = 14.0, 96.0  # percent of the width: x of the lowest and the highest value
MARGIN = 0.5  # points or percent: smallest margin above and below the values
APART = 17  # px between labels
GAP = 11  # px from a point to its label
NARROW = 340  # px: width of a phone
LETTER = 7.5  # px: approximate width of a letter


@dataclass(frozen=True)
class Point:
    """Point of the chart: x in ms, y in percent or points. interval: 95 % interval of x. mark: CSS class."""

    label: str
    x: float
    y: float
    interval: tuple[float, float]
    mark: str = ""


def scatter(title: str, points: Sequence[Point], x_name: str, y_name: str, y_most: float) -> Markup:
    """Draw points with whiskers along x. The x axis begins at 0; the y axis does not go beyond `y_most`."""
    x_ticks = ticks(0.0, max(point.interval[1] for point in points) * 1.05)
    low, high = min(point.y for point in points), max(point.y for point in points)
    margin = max((high - low) * 0.1, MARGIN)
    y_ticks = ticks(low - margin, min(high + margin, y_most))

    def x_of(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * value / x_ticks[-1]

    def y_of(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    drawn = [line(LEFT, y_of(tick), RIGHT, y_of(tick), "grid") for tick in y_ticks]
    drawn += [text(LEFT - 1.5, y_of(tick) + 4, _short(tick), "tick", "end") for tick in y_ticks]
    drawn += [text(x_of(tick), BOTTOM + 20, _short(tick), "tick", "middle") for tick in x_ticks]
    drawn += [text(0, 12, y_name, "axis"), text(RIGHT, HEIGHT - 6, x_name, "axis", "end")]
    places = [(x_of(point.x), y_of(point.y)) for point in points]
    for point, (x, y) in zip(points, places, strict=True):
        drawn.append(line(x_of(point.interval[0]), y, x_of(point.interval[1]), y, "whisker"))
        drawn.append(
            element(
                "circle", element("title", point.label), cx=f"{x:.2f}%", cy=f"{y:g}", r=6, class_=f"point {point.mark}"
            )
        )
    drawn += _labels(points, places, [y_of(tick) for tick in y_ticks])
    said = "; ".join(f"{point.label}: {point.x:.3g} ms, {point.y:.2f}" for point in points)
    return chart(title, said, HEIGHT, drawn)


def ticks(low: float, high: float) -> list[float]:
    """Return about four round values that cover low to high; their step is 1, 2 or 5 times a power of ten."""
    raw = max((high - low) / 4, 1e-9)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _labels(
    points: Sequence[Point], places: Sequence[tuple[float, float]], tick_heights: Sequence[float]
) -> list[Markup]:
    """Draw each label at the first free spot near its point: right, left, above, below, then further away.

    A label further away gets a line to its point.
    """
    taken = [_Box.around(x, y, 16) for x, y in places] + [_Box(0, y - 8, LEFT * NARROW / 100, 16) for y in tick_heights]
    drawn = []
    for point, (x, y) in zip(points, places, strict=True):
        spots = [_Spot("start", GAP, 0), _Spot("end", -GAP, 0)]
        spots += [_Spot("end", 0, -APART), _Spot("start", 0, -APART), _Spot("start", 0, APART), _Spot("end", 0, APART)]
        spots += [_Spot("middle", 0, down * APART) for down in (-2, 2, -3, 3)]
        boxes = [spot.box(x, y, len(point.label) * LETTER) for spot in spots]
        free = [i for i, box in enumerate(boxes) if box.inside() and not any(box.covers(other) for other in taken)]
        spot = spots[free[0] if free else 0]
        taken.append(boxes[spots.index(spot)])
        if abs(spot.dy) > APART:
            drawn.append(line(x, y, x, y + spot.dy - math.copysign(8, spot.dy), "leader"))
        drawn.append(
            element(
                "text",
                point.label,
                x=f"{x:.2f}%",
                y=f"{y + spot.dy + 4:g}",
                dx=spot.dx,
                class_=f"label {point.mark}",
                text_anchor=spot.anchor,
            )
        )
    return drawn


@dataclass(frozen=True)
class _Spot:
    """Position of a label, in px from its point. anchor: SVG's text-anchor."""

    anchor: str
    dx: float
    dy: float

    def box(self, x: float, y: float, width: float) -> _Box:
        """Return the area of a label `width` px wide. x: percent, y: px of the point."""
        left = {"start": 0.0, "middle": -width / 2, "end": -width}[self.anchor]
        return _Box(x * NARROW / 100 + self.dx + left, y + self.dy - 8, width, 16)


@dataclass(frozen=True)
class _Box:
    """Rectangle in px on a chart of width NARROW. Rectangles that are apart there are apart on wider charts too."""

    x: float
    y: float
    width: float
    height: float

    @classmethod
    def around(cls, x: float, y: float, side: float) -> _Box:
        """Return the square with its centre at x (percent), y (px)."""
        return cls(x * NARROW / 100 - side / 2, y - side / 2, side, side)

    def covers(self, other: _Box) -> bool:
        """Test whether two rectangles overlap."""
        across = self.x < other.x + other.width and other.x < self.x + self.width
        return across and self.y < other.y + other.height and other.y < self.y + self.height

    def inside(self) -> bool:
        """Test whether the rectangle lies in the chart, below the y axis's name."""
        return self.x >= 0 and self.x + self.width <= NARROW and self.y >= AXIS


def _short(value: float) -> str:
    """Format a tick value."""
    return f"{value + 0.0:.6g}"

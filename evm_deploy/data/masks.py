"""Masks of objects in numpy: run lengths as COCO writes them, polygons, and the masks that a detector gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PROBABLE = 0.5  # a pixel whose probability is at least this belongs to the object
BAND = 1 << 20  # most pixels whose probabilities are in memory at once
FINER = 5  # cells of a pixel's side in which COCO draws the outline of a polygon
FARTHEST = 1e5  # pixels from the image's corner that a point of a polygon may lie
MAX_DIGITS = 12  # of a number in COCO's text, 5 bits each


class AnyMask(Protocol):
    """Mask of an object in an image."""

    def runs(self) -> RunMask:
        """Return the mask as run lengths."""
        ...


@dataclass(frozen=True, eq=False)
class RunMask:
    """Mask of an image as run lengths. size: (H, W) of the image in pixels.

    edges: (2 r,) int64, rising. Pixels are counted down each column, column by column; those from edges[0] to before
    edges[1] belong to the object, those from edges[2] to before edges[3], and so on.
    """

    size: tuple[int, int]
    edges: NDArray[np.int64]

    @classmethod
    def of(cls, bitmap: NDArray[Any], place: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> RunMask:
        """Return the mask of a bitmap (h, w) at `place` (top, left) of an image of `size`, by default its own."""
        height, width = size or bitmap.shape
        columns = np.zeros((bitmap.shape[1], bitmap.shape[0] + 2), np.int8)
        columns[:, 1:-1] = bitmap.T != 0
        column, row = np.nonzero(np.diff(columns))
        edges = (column + place[1]) * height + row + place[0]
        kept = np.ones(len(edges), bool)  # a run that goes on in the next column is one run
        same = np.flatnonzero(edges[1:-1:2] == edges[2::2])
        kept[1 + 2 * same], kept[2 + 2 * same] = False, False
        return cls((height, width), edges[kept])

    @classmethod
    def from_coco(cls, segmentation: Any, size: tuple[int, int]) -> RunMask:
        """Return the mask of a `segmentation` of COCO: polygons, or run lengths as text or as a list.

        size: (H, W) of the image. Raises ValueError for a damaged segmentation, and for one of another size.
        """
        try:
            return cls._read(segmentation, size)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"a segmentation holds odd values: {error}") from error

    @classmethod
    def _read(cls, segmentation: Any, size: tuple[int, int]) -> RunMask:
        if isinstance(segmentation, Mapping):
            counts, given = segmentation.get("counts"), segmentation.get("size")
            if given is None or tuple(given) != tuple(size):
                raise ValueError(f"a segmentation has the size {given}, its image {list(size)}")
            lengths = np.array(counts, np.int64) if isinstance(counts, list) else _lengths_of(counts)
            whole = size[0] * size[1]
            if lengths.ndim != 1 or ((lengths < 0) | (lengths > whole)).any() or lengths.sum() != whole:
                raise ValueError("the run lengths of a segmentation do not fill its image")
            return cls(size, _toggled(lengths.cumsum(), size))
        if not isinstance(segmentation, list) or not segmentation:
            raise ValueError("a segmentation has no polygons and no run lengths")
        return _union([_of_polygon(each, size) for each in segmentation], size)

    def to_coco(self) -> dict[str, Any]:
        """Return COCO's run lengths {size: [H, W], counts: text}, as pycocotools.mask.decode reads them."""
        lengths = self._lengths()
        if len(lengths) > 1 and not lengths[-1]:
            lengths = lengths[:-1]
        return {"size": list(self.size), "counts": _text_of(lengths)}

    def runs(self) -> RunMask:
        """Return the mask itself."""
        return self

    @property
    def area(self) -> int:
        """Number of pixels of the object."""
        return int((self.edges[1::2] - self.edges[::2]).sum())

    def array(self) -> NDArray[np.bool_]:
        """Return the mask (H, W) bool."""
        height, width = self.size
        lengths = self._lengths()
        values = np.arange(len(lengths)) % 2 == 1
        return np.ascontiguousarray(np.repeat(values, lengths).reshape(width, height).T)

    def _lengths(self) -> NDArray[np.int64]:
        """Return the lengths of all runs: without the object, of the object, and so on."""
        return np.diff(np.concatenate([[0], self.edges, [self.size[0] * self.size[1]]]))

    def shared(self, other: RunMask) -> int:
        """Return the number of pixels that belong to both masks of one image."""
        if not len(self.edges) or not len(other.edges):
            return 0
        lengths = np.diff(other.edges)
        lengths[1::2] = 0
        before = np.interp(self.edges, other.edges, np.concatenate([[0], lengths.cumsum()]))  # pixels of `other`
        return int((before[1::2] - before[::2]).sum())


@dataclass(frozen=True, eq=False)
class DetectedMask:
    """Mask of a detection. It is pasted into the image when a method is called: until then it needs 3 KB.

    probabilities: (side, side) float32 that a cell of `box` belongs to the object. box: x1, y1, x2, y2 in pixels of the
    image: the region that the network looked at. size: (H, W) of the upright original image in pixels.
    """

    probabilities: NDArray[np.float32]
    box: tuple[float, float, float, float]
    size: tuple[int, int]

    def crop(self) -> tuple[NDArray[np.bool_], tuple[int, int]]:
        """Return the mask (h, w) bool of the pixels that the box touches, and the place (top, left) of this crop.

        A pixel's probability is bilinear at its centre, with zeros around the box. Source: mmdet 3.3.0,
        `_do_paste_mask`, which gives the same pixels.
        """
        x1, y1, x2, y2 = self.box
        top, bottom = _touched(y1, y2, self.size[0])
        left, right = _touched(x1, x2, self.size[1])
        found = np.zeros((bottom - top, right - left), bool)
        if found.size:
            columns = _bilinear(left, right, x1, x2, self.probabilities.shape[1]).T
            step = max(1, BAND // found.shape[1])
            for start in range(top, bottom, step):
                end = min(bottom, start + step)
                rows = _bilinear(start, end, y1, y2, len(self.probabilities))
                found[start - top : end - top] = rows @ self.probabilities @ columns >= PROBABLE
        return found, (top, left)

    def array(self) -> NDArray[np.bool_]:
        """Return the mask (H, W) bool of the whole image."""
        found, (top, left) = self.crop()
        whole = np.zeros(self.size, bool)
        whole[top : top + found.shape[0], left : left + found.shape[1]] = found
        return whole

    def runs(self) -> RunMask:
        """Return the mask as run lengths."""
        found, place = self.crop()
        return RunMask.of(found, place, self.size)

    def to_coco(self) -> dict[str, Any]:
        """Return COCO's run lengths {size: [H, W], counts: text}, as pycocotools.mask.decode reads them."""
        return self.runs().to_coco()


def mask_overlaps(a: Sequence[AnyMask], b: Sequence[AnyMask], crowd: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the intersection over union (n, m) of masks of one image. crowd: (m,) bool, of b.

    For a crowd it is the share of the mask of `a` that lies in the crowd. Empty masks give 0.
    """
    ours, theirs = [each.runs() for each in a], [each.runs() for each in b]
    shared = np.array([[one.shared(other) for other in theirs] for one in ours], np.float64).reshape(len(a), len(b))
    areas, others = (np.array([each.area for each in masks], np.float64) for masks in (ours, theirs))
    whole = np.where(crowd[None], areas[:, None], areas[:, None] + others[None] - shared)
    return shared / np.where(shared > 0, whole, 1)


def _touched(low: float, high: float, pixels: int) -> tuple[int, int]:
    """Return the first pixel that an interval touches, and the one behind the last, within the image."""
    first = int(np.clip(np.floor(low), 0, pixels))
    return first, max(first, int(np.clip(np.ceil(high), 0, pixels)))


def _bilinear(start: int, end: int, low: float, high: float, cells: int) -> NDArray[np.float32]:
    """Return the weights (end - start, cells) of a box's cells in the centres of the pixels from `start` to `end`."""
    places = (np.arange(start, end) + 0.5 - low) / max(high - low, 1e-12) * cells - 0.5
    distances = np.abs(places[:, None] - np.arange(cells))
    weights: NDArray[np.float32] = np.maximum(1 - distances, 0).astype(np.float32)
    return weights


def _toggled(places: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Return the edges of a mask that changes at each of `places`: twice at one place is no change."""
    end = size[0] * size[1]
    unique, times = np.unique(places, return_counts=True)
    edges = unique[(times % 2 == 1) & (unique < end)]
    return np.append(edges, end) if len(edges) % 2 else edges


def _union(masks: Sequence[RunMask], size: tuple[int, int]) -> RunMask:
    """Return the mask of the pixels that belong to any of the masks."""
    if len(masks) == 1:
        return masks[0]
    starts = np.concatenate([each.edges[::2] for each in masks])
    ends = np.concatenate([each.edges[1::2] for each in masks])
    places = np.concatenate([starts, ends])
    order = np.argsort(places, kind="stable")  # at one place the starts come first
    depth = np.repeat([1, -1], len(starts))[order].cumsum()
    before = np.concatenate([[0], depth[:-1]])
    return RunMask(size, places[order][(depth == 0) | (before == 0)])


def _of_polygon(points: Any, size: tuple[int, int]) -> RunMask:
    """Return the mask of a polygon x1, y1, x2, y2, .. in pixels, with the pixels that pycocotools gives it.

    The outline is drawn on a grid FINER times as fine, edge by edge. Where it crosses the middle of a pixel's column,
    the mask changes from this height on. Source: behaviour of `pycocotools.mask.frPyObjects`, 2.0.11.
    """
    flat = np.array(points, np.float64)
    if flat.ndim != 1 or len(flat) < 6 or len(flat) % 2 or not (np.abs(flat) <= FARTHEST).all():
        raise ValueError("a polygon is no list of at least 3 points near the image")
    height, width = size
    corners = np.trunc(flat.reshape(-1, 2) * FINER + 0.5).astype(np.int64)
    outline = np.concatenate([_line(*ends) for ends in zip(corners, np.roll(corners, -1, 0), strict=True)])
    (x, y), (last_x, last_y) = outline[1:].T, outline[:-1].T
    column = (np.where(x < last_x, x, x - 1) + 0.5) / FINER - 0.5
    row = (np.minimum(y, last_y) + 0.5) / FINER - 0.5
    crosses = (x != last_x) & (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    places = column[crosses] * height + np.ceil(row[crosses].clip(0, height))
    return RunMask(size, _toggled(places.astype(np.int64), size))


def _line(start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the grid points (n, 2) of a line in its direction, one for each step along its longer axis.

    The other coordinate is rounded from the end with the smaller coordinate on the longer axis.
    """
    long = 0 if abs(end[0] - start[0]) >= abs(end[1] - start[1]) else 1
    low, high = (start, end) if start[long] <= end[long] else (end, start)
    steps = np.arange(high[long] - low[long] + 1)
    points = np.empty((len(steps), 2), np.int64)
    points[:, long] = low[long] + steps
    slope = (high[1 - long] - low[1 - long]) / max(high[long] - low[long], 1)
    points[:, 1 - long] = np.trunc(low[1 - long] + slope * steps + 0.5)
    return points if low is start else points[::-1]


def _text_of(lengths: NDArray[np.int64]) -> str:
    """Write run lengths as COCO's text: from the fourth on, the difference from the one before the last.

    A number is its digits of 5 bits, the lowest first, as characters from `0` on; 32 is added if more digits follow.
    """
    values = lengths.copy()
    values[3:] -= lengths[1:-2]
    digits, open_ = [], np.ones(len(values), bool)
    while open_.any():
        digit, values = values & 31, values >> 5
        more = open_ & np.where(digit & 16, values != -1, values != 0)
        digits.append(np.where(open_, digit + 32 * more + 48, 0))
        open_ = more
    table = np.stack(digits, 1).astype(np.uint8)
    return table[table > 0].tobytes().decode("ascii")


def _lengths_of(text: Any) -> NDArray[np.int64]:
    """Read run lengths from COCO's text. Raises ValueError."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    if not isinstance(raw, bytes) or not raw:
        raise ValueError("a segmentation has no run lengths")
    digits = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0
    if digits.min() < 0 or digits.max() > 63 or not last[-1]:
        raise ValueError("the text of run lengths is damaged")
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits))))
    if place.max() >= MAX_DIGITS:
        raise ValueError("the text of run lengths is damaged")
    values = np.add.reduceat((digits & 31) << (5 * place), starts)
    values -= np.where(digits[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values

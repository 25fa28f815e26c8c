"""Second stage of a detector in torch, in a form for export: proposals, RoIAlign, and detections of its heads.

Every step has static shapes but for the batch: each image has the same number of proposals and of masks, and rows
without one give nothing. Semantics: mmdet 3.3.0, `RPNHead`, `SingleRoIExtractor` and `StandardRoIHead`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.model.detection import BOXES, COUNT, LABELS, SCORES, Anchors, BoxSelection, Selection

MASKS = "masks"
FINEST = 56  # pixels: regions with sides of twice this number and more are cropped from the second level
EDGE = 2  # cells around a level in an atlas: a sample half a cell outside reads the first one
PROPOSALS = SelectionSettings(score_thr=0.0, iou=0.7, max_det=1000)
EXACT = 1e-6  # added to relative sizes, so that a region of exactly twice a size belongs to the next level


@torch.library.custom_op("evm::roi_align", mutates_args=())
def roi_align(maps: Tensor, boxes: Tensor, size: int) -> Tensor:
    """RoIAlign: maps (b, C, h, w), boxes (b, n, 4) x1 y1 x2 y2 -> means in their bins (b * n, C, size, size) float32.

    boxes: in cells of the map. Cell i has its centre at i + 0.5 (`aligned`, half pixel). A bin is the mean of
    ceil(length / size) samples on each axis, bilinear (`sampling_ratio` 0). Samples over one cell outside the map are
    0. Source: arXiv 1703.06870; ONNX RoiAlign 16.
    """
    channels_last = maps.permute(0, 2, 3, 1).contiguous().numpy()
    _, height, width, channels = channels_last.shape
    found = np.zeros((boxes.shape[0] * boxes.shape[1], size, size, channels), np.float32)
    scaled = boxes.numpy().reshape(-1, 4) - np.float32(0.5)
    near = (scaled[:, 2:] >= -1).all(1) & (scaled[:, :2] <= (width, height)).all(1)
    for i in np.flatnonzero(near):
        x1, y1, x2, y2 = scaled[i]
        (top, rows), (left, columns) = _weights(y1, y2, size, height), _weights(x1, x2, size, width)
        if not rows.size or not columns.size:
            continue
        part = channels_last[i // boxes.shape[1], top : top + rows.shape[1], left : left + columns.shape[1]]
        by_row = rows @ part.reshape(len(part), -1)
        found[i] = columns @ by_row.reshape(size, -1, channels)
    return torch.from_numpy(found.transpose(0, 3, 1, 2).copy())


@roi_align.register_fake
def _(maps: Tensor, boxes: Tensor, size: int) -> Tensor:
    return maps.new_empty((boxes.shape[0] * boxes.shape[1], maps.shape[1], size, size))


def _weights(start: np.float32, end: np.float32, bins: int, cells: int) -> tuple[int, NDArray[np.float32]]:
    """Return the first cell that an axis of a region reads, and the weights (bins, cells read) of its bins."""
    length = np.float32(end - start) / np.float32(bins)
    samples = math.ceil(length)
    within = (np.arange(samples, dtype=np.float32) + np.float32(0.5)) * length / np.float32(max(samples, 1))
    places = start + np.arange(bins, dtype=np.float32)[:, None] * length + within
    inside = (places >= -1) & (places <= cells)
    if not inside.any():
        return 0, np.empty((bins, 0), np.float32)
    places = places.clip(0, cells - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, cells - 1)
    first = low[inside].min()
    weights = np.zeros((bins, int(high[inside].max()) + 1 - first), np.float32)
    share = np.where(inside, places - low, 0) / samples
    rows = np.nonzero(inside)[0]
    np.add.at(weights, (rows, low[inside] - first), (inside / np.float32(samples) - share)[inside])
    np.add.at(weights, (rows, high[inside] - first), share[inside])
    return int(first), weights


class Proposals(Selection):
    """Regions of an image that the second stage looks at, from the maps of a region proposal network (RPN).

    NMS keeps the levels apart, in place of classes. Rows beyond the last proposal are boxes of zeros.
    """

    def _level(self, logits: Tensor, deltas: Tensor, level: int) -> tuple[Tensor, ...]:
        value, label, *rest = super()._level(logits, deltas, level)
        return value, torch.full_like(label, level), *rest


@dataclass(frozen=True)
class Atlas:
    """Levels of a feature pyramid side by side in one map, so that one RoIAlign crops the regions of all levels.

    maps: (b, C, h, w). places: (levels, 3) float32, of each level: cells for one pixel of the input, and x and y of its
    corner in the map. The edge of a level is repeated around it, as RoIAlign does at the edge of a map.
    """

    maps: Tensor
    places: Tensor

    @classmethod
    def of(cls, levels: Sequence[Tensor], strides: Sequence[int]) -> Atlas:
        """Join levels (b, C, h, w): the finest one, and below it the others in a row. strides: in pixels."""
        finest, *others = levels
        beside = sum(int(level.shape[3]) + 2 * EDGE for level in others)
        width = max(int(finest.shape[3]) + 2 * EDGE, beside)
        height = max((int(level.shape[2]) for level in others), default=0)
        rows = [_framed(finest, int(finest.shape[2]), width)]
        places, x, y = [(1 / strides[0], EDGE, EDGE)], EDGE, int(finest.shape[2]) + 3 * EDGE
        parts = []
        for i, level in enumerate(others):
            wide = int(level.shape[3]) + 2 * EDGE
            parts.append(_framed(level, height, wide + (width - beside if level is others[-1] else 0)))
            places.append((1 / strides[i + 1], x, y))
            x += wide
        rows += [torch.cat(parts, 3)] if parts else []
        return cls(torch.cat(rows, 2), torch.tensor(places, dtype=torch.float32))

    def crop(self, boxes: Tensor, size: int, finest: float) -> Tensor:
        """Crop boxes (b, n, 4) in pixels of the input -> (b * n, C, size, size). Empty boxes give zeros.

        The level of a box is floor(log2(sqrt(its area) / finest)), limited to the levels.
        """
        sides = boxes[..., 2:] - boxes[..., :2]
        relative = (sides[..., 0] * sides[..., 1]).sqrt() / finest + EXACT
        level = torch.zeros_like(relative, dtype=torch.int64)
        for i in range(1, len(self.places)):
            level = level + (relative >= 2.0**i).to(torch.int64)
        place = self.places[level]
        cells = boxes * place[..., :1] + place[..., [1, 2, 1, 2]]
        filled = (cells[..., 2:] - cells[..., :2]).amin(-1, keepdim=True) > 0  # OpenVINO gives NaN for an empty box
        beside = torch.tensor([-9.0, -9.0, -8.0, -8.0])  # RoIAlign reads one sample of zero there for each bin
        crops: Tensor = roi_align(self.maps, torch.where(filled, cells, beside), size)
        return crops


def _framed(level: Tensor, height: int, width: int) -> Tensor:
    """Repeat the edge of a level (b, C, h, w) around it -> (b, C, height + 2 EDGE, width)."""
    bottom, right = height - int(level.shape[2]) + EDGE, width - int(level.shape[3]) - EDGE
    return F.pad(level, (EDGE, right, EDGE, bottom), mode="replicate")


@dataclass(frozen=True)
class RegionSettings:
    """Settings of the second stage of a detector.

    anchors: of the RPN. proposals: their selection. before: most proposals of a level before NMS. min_size: width and
    height of a proposal are larger. strides: of the levels that regions are cropped from. finest: as in `Atlas`.
    bins: of a region for the box head; mask_bins: for the mask head. means, stds: of the box head's deltas.
    """

    anchors: Anchors
    proposals: SelectionSettings = PROPOSALS
    before: int = 1000
    min_size: float = 0.0
    strides: tuple[int, ...] = (4, 8, 16, 32)
    finest: float = FINEST
    bins: int = 7
    mask_bins: int = 14
    means: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    stds: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)


class RegionSelection(BoxSelection):
    """Selection of detections among proposals: the second stage of Faster R-CNN, and of Mask R-CNN with `mask_head`.

    classes: number of classes. bbox_head: crops (m, C, bins, bins) -> logits (m, classes + 1), the background last, and
    deltas (m, classes * 4), or (m, 4) for all classes. mask_head: crops (m, C, mask_bins, mask_bins) -> logits
    (m, classes, side, side), or (m, 1, side, side) for all classes.
    """

    def __init__(
        self,
        region: RegionSettings,
        classes: int,
        settings: SelectionSettings,
        size: tuple[int, int],
        bbox_head: Callable[[Tensor], tuple[Tensor, Tensor]],
        mask_head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(settings, size, region.means, region.stds)
        self.region, self.classes = region, classes
        self.proposals = Proposals(
            region.anchors, 1, region.proposals, size, before=region.before, min_size=region.min_size
        )
        self._heads: tuple[Any, Any] = (bbox_head, mask_head)  # a tuple: their place in the network is their only one
        self.outputs = (BOXES, SCORES, LABELS, COUNT, *([MASKS] if mask_head else []))

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Map the RPN's logits of every level, then its deltas of every level, then the pyramid's levels.

        Returns boxes (b, max_det, 4) float32, scores (b, max_det) float32, labels (b, max_det) int32, count (b,) int32
        as `Selection` does, and, with a mask head, masks (b, max_det, side, side) float32: the probability that a cell
        of a box belongs to its object. Boxes without an area are left out.
        """
        of_rpn = 2 * len(self.proposals.anchors.strides)
        proposals, atlas = self.proposals(*maps[:of_rpn])[0], Atlas.of(maps[of_rpn:], self.region.strides)
        bbox_head, mask_head = self._heads
        crops = atlas.crop(proposals, self.region.bins, self.region.finest)
        found = self.suppressed(*self._candidates(proposals, *bbox_head(crops)))
        return found if mask_head is None else (*found, self._masks(atlas, found[0], found[2]))

    def _candidates(self, proposals: Tensor, logits: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs of proposal and class, (b, n * classes, ..): boxes, scores, which are -1 below the threshold
        and for rows without a proposal, and labels. The class is the faster index.
        """
        b, n, k = proposals.shape[0], proposals.shape[1], self.classes
        low, high = proposals[..., :2], proposals[..., 2:]
        centre, side = ((low + high) * 0.5)[:, :, None], (high - low)[:, :, None]
        boxes = self.decoded(centre, side, deltas.reshape(b, n, -1, 4)).expand(-1, -1, k, -1).reshape(b, n * k, 4)
        scores = logits.softmax(-1)[:, :k].reshape(b, n * k)
        filled = (side.amin(-1) > 0).expand(-1, -1, k).reshape(b, n * k)
        kept = filled & (scores > self.settings.score_thr) & ((boxes[..., 2:] - boxes[..., :2]).amin(-1) > 0)
        label = (torch.arange(n * k) % k)[None].expand(b, -1)
        return boxes, torch.where(kept, scores, -1.0), label

    def _masks(self, atlas: Atlas, boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the masks (b, n, side, side) of the label of each row, 0 in rows without a detection."""
        logits = self._heads[1](atlas.crop(boxes, self.region.mask_bins, self.region.finest))
        if logits.shape[1] > 1:
            index = labels.to(torch.int64).clamp(min=0).reshape(-1, 1, 1, 1)
            logits = logits.gather(1, index.expand(-1, -1, *logits.shape[2:]))
        masks = torch.sigmoid(logits).reshape(*boxes.shape[:2], *logits.shape[2:])
        return torch.where((labels >= 0)[:, :, None, None], masks, 0.0)

"""Selection of detections in torch, for detectors with anchors: from a head's maps to boxes, in a form for export.

Every step has static shapes but for the batch, and gathers values instead of moving maps: the class map of a detector
has millions of values, of which a few thousand are read. Semantics: mmdet 3.3.0, `AnchorHead.predict_by_feat`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evm_deploy.data.boxes import NO_LABEL, SelectionSettings, greedy_nms

BOXES, SCORES, LABELS, COUNT = "boxes", "scores", "labels", "count"
LARGEST_DELTA = abs(math.log(16 / 1000))  # of dw and dh: a box grows to at most 62.5 times its anchor


@dataclass(frozen=True)
class Anchors:
    """Anchors of a detector and the coding of boxes relative to them.

    strides: of each level, in pixels. scales: sides of anchors in units of the stride. ratios: h / w. offset: of the
    anchor's centre in its cell, in units of the stride. means, stds: of the deltas dx, dy, dw, dh.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    scales: tuple[float, ...] = tuple(4 * 2 ** (i / 3) for i in range(3))
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    offset: float = 0.0
    means: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def sides(self, stride: int) -> Tensor:
        """Return width and height (anchors, 2) float32, in pixels, of the anchors of a level. The ratio is slower."""
        root = torch.tensor(self.ratios).sqrt()[:, None]
        scales = torch.tensor(self.scales)[None]
        return torch.stack([(stride * (1 / root) * scales).reshape(-1), (stride * root * scales).reshape(-1)], 1)

    @property
    def each(self) -> int:
        """Number of anchors of a position."""
        return len(self.scales) * len(self.ratios)


@torch.library.custom_op("evm::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """Greedy non-maximum suppression of each image: boxes (b, n, 4), scores (b, n) float32 -> indices (b, most) int64.

    Rows with a score of 0 or less are left out. Indices are by falling score; a row without a box is -1. Two boxes
    whose intersection over union is larger than `iou` suppress each other. See `data.boxes.greedy_nms`.
    """
    found = np.full((len(boxes), most), -1, np.int64)
    for row, one, score in zip(found, boxes.numpy(), scores.numpy(), strict=True):
        kept = greedy_nms(one, score, iou, most)
        row[: len(kept)] = kept
    return torch.from_numpy(found)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], most), dtype=torch.int64)


class BoxSelection(nn.Module):
    """Base of a selection of detections: decoding of deltas, and non-maximum suppression of each class.

    means, stds: of the deltas dx, dy, dw, dh. size: (H, W) of the network's input in pixels, where boxes are clipped.
    """

    def __init__(
        self, settings: SelectionSettings, size: tuple[int, int], means: Sequence[float], stds: Sequence[float]
    ) -> None:
        super().__init__()
        self.settings, self.size = settings, size
        self.coded = any(means) or any(std != 1 for std in stds)
        height, width = size
        self.corner = nn.Buffer(torch.tensor([width, height, width, height], dtype=torch.float32), persistent=False)
        self.means = nn.Buffer(torch.tensor(tuple(means)), persistent=False)
        self.stds = nn.Buffer(torch.tensor(tuple(stds)), persistent=False)

    def decoded(self, centre: Tensor, side: Tensor, delta: Tensor) -> Tensor:
        """Return the corners (.., 4) x1 y1 x2 y2, clipped to the input, of deltas (.., 4) to boxes (.., 2)."""
        if self.coded:
            delta = delta * self.stds + self.means
        centre = centre + side * delta[..., :2]
        half = side * delta[..., 2:].clamp(-LARGEST_DELTA, LARGEST_DELTA).exp() * 0.5
        corners = torch.cat([centre - half, centre + half], -1)
        return torch.minimum(corners.clamp(min=0.0), self.corner)

    def suppressed(self, boxes: Tensor, scores: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Return the detections after NMS of each class: boxes, scores, labels and their count.

        boxes: (b, n, 4). scores: (b, n); rows with a score of 0 or less take no part. label: (b, n) int64.
        """
        shift = label.to(torch.float32) * (float(max(self.size)) + 1.0)
        found = nms(boxes + shift[:, :, None], scores, self.settings.iou, self.settings.max_det)
        real = found >= 0
        rows = torch.where(real, found, 0)
        boxes = boxes.gather(1, rows[:, :, None].expand(-1, -1, 4))
        return (
            torch.where(real[:, :, None], boxes, 0.0),
            torch.where(real, scores.gather(1, rows), 0.0),
            torch.where(real, label.gather(1, rows), NO_LABEL).to(torch.int32),
            real.to(torch.int32).sum(1).to(torch.int32),
        )


class Selection(BoxSelection):
    """Selection of detections from a head's maps, in pixels of the network's input.

    classes: number of classes. before: most pairs of anchor and class that a level gives (nms_pre of mmdet).
    min_size: width and height of a detection are larger. size: (H, W) of the input in pixels.
    """

    def __init__(
        self,
        anchors: Anchors,
        classes: int,
        settings: SelectionSettings,
        size: tuple[int, int],
        *,
        before: int = 1000,
        min_size: float = 0.0,
    ) -> None:
        super().__init__(settings, size, anchors.means, anchors.stds)
        self.anchors, self.classes, self.before, self.min_size = anchors, classes, before, min_size
        self.threshold = math.log(settings.score_thr / (1 - settings.score_thr)) if settings.score_thr else None
        for i, stride in enumerate(anchors.strides):
            self.register_buffer(f"sides{i}", anchors.sides(stride), persistent=False)
        self.outputs = (BOXES, SCORES, LABELS, COUNT) if settings.nms == "graph" else (BOXES, SCORES, LABELS)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Map the logits (b, anchors * classes, h, w) of every level, then the deltas (b, anchors * 4, h, w) of every.

        With nms `graph`, returns boxes (b, max_det, 4) float32, scores (b, max_det) float32, labels (b, max_det) int32
        and count (b,) int32: the first `count` rows are detections, by falling score. The others are 0, with label -1.
        With nms `none`, returns boxes, scores and labels of the candidates (b, n, ..) that are above the threshold,
        level by level; the other rows have score 0 and label -1.
        """
        levels = len(self.anchors.strides)
        parts = [
            self._level(logits, deltas, i)
            for i, (logits, deltas) in enumerate(zip(maps[:levels], maps[levels:], strict=True))
        ]
        value, label, centre, side, delta = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        boxes = self.decoded(centre, side, delta)
        sides = boxes[..., 2:] - boxes[..., :2]
        kept = sides.amin(-1) > self.min_size
        if self.threshold is not None:
            kept = kept & (value > self.threshold)
        scores = torch.sigmoid(value)
        if self.settings.nms == "none":
            return boxes, torch.where(kept, scores, 0.0), torch.where(kept, label, NO_LABEL).to(torch.int32)
        return self.suppressed(boxes, torch.where(kept, scores, -1.0), label)

    def _level(self, logits: Tensor, deltas: Tensor, level: int) -> tuple[Tensor, ...]:
        """Return the best pairs of anchor and class of a level: logit, label, centre, side and deltas, (b, n, ..)."""
        b, (h, w), k, each = logits.shape[0], logits.shape[2:], self.classes, self.anchors.each
        pixels = h * w
        flat = logits.reshape(b, -1)
        if k > 1 and each * pixels > self.before:
            # The best pairs belong to the anchors that are best by their best class: the others are never looked at
            best = logits.reshape(b, each, k, pixels).amax(2).reshape(b, -1)
            anchor = best.topk(self.before, 1).indices
            anchor, position = anchor // pixels, anchor % pixels
            label = torch.arange(k)
            index = ((anchor * k)[:, :, None] + label) * pixels + position[:, :, None]  # (b, before, k)
            value, pair = flat.gather(1, index.reshape(b, -1)).topk(min(self.before, self.before * k), 1)
            row, label = pair // k, pair % k
            anchor, position = anchor.gather(1, row), position.gather(1, row)
        else:
            value, pair = flat.topk(min(self.before, each * k * pixels), 1)
            channel, position = pair // pixels, pair % pixels
            anchor, label = channel // k, channel % k
        return value, label, *self._anchored(deltas, anchor, position, level)

    def _anchored(self, deltas: Tensor, anchor: Tensor, position: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return centre, side and deltas (b, n, ..) of anchors (b, n) at positions (b, n) of a level's map."""
        b, _, h, w = deltas.shape
        index = ((anchor * 4)[:, :, None] + torch.arange(4)) * (h * w) + position[:, :, None]
        delta = deltas.reshape(b, -1).gather(1, index.reshape(b, -1)).reshape(b, -1, 4)
        cell = torch.stack([position % w, position // w], 2).to(torch.float32)
        centre = (cell + self.anchors.offset) * float(self.anchors.strides[level])
        return centre, self.get_buffer(f"sides{level}")[anchor], delta

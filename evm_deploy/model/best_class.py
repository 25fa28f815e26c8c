"""Selection of boxes with one class each, for runtimes whose non-maximum suppression takes the best class of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from evm_deploy.model.detection import Selection

COORDINATES, CONFIDENCE = "coordinates", "confidence"


class BestClassSelection(Selection):
    """Selection of the best anchors of each level by their best class, without a threshold and without suppression.

    Unlike `Selection`, whose candidates are pairs of anchor and class as in mmdet, an anchor has one class.
    """

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Map the logits (1, anchors * classes, h, w) of every level, then the deltas (1, anchors * 4, h, w) of every.

        Returns coordinates (n, 4) float32: centre x and y, width and height in units of the input's width and height,
        0..1, and confidence (n, classes) float32: the score of the best class, 0 for the others. The sum of a row is at
        most 1. Rows of boxes that are too small are 0.
        """
        levels = len(self.anchors.strides)
        parts = [
            self._best(logits, deltas, i)
            for i, (logits, deltas) in enumerate(zip(maps[:levels], maps[levels:], strict=True))
        ]
        value, label, centre, side, delta = (torch.cat(each, 1) for each in zip(*parts, strict=True))
        boxes = self.decoded(centre, side, delta)
        low, high = boxes[..., :2], boxes[..., 2:]
        scores = torch.where((high - low).amin(-1) > self.min_size, torch.sigmoid(value), 0.0)
        chosen = label[:, :, None] == torch.arange(self.classes)
        confidence = torch.where(chosen, scores[:, :, None], 0.0)
        coordinates = torch.cat([(low + high) * 0.5, high - low], 2) / self.corner
        return coordinates.reshape(-1, 4), confidence.reshape(-1, self.classes)

    def _best(self, logits: Tensor, deltas: Tensor, level: int) -> tuple[Tensor, ...]:
        """Return the best anchors of a level: logit, label, centre, side and deltas, (1, n, ..)."""
        b, (h, w), k, each = logits.shape[0], logits.shape[2:], self.classes, self.anchors.each
        pixels = h * w
        best = logits.reshape(b, each, k, pixels).amax(2).reshape(b, -1)
        place = best.topk(min(self.before, each * pixels), 1).indices
        anchor, position = place // pixels, place % pixels
        index = ((anchor * k)[:, :, None] + torch.arange(k)) * pixels + position[:, :, None]  # (1, n, k)
        value, label = logits.reshape(b, -1).gather(1, index.reshape(b, -1)).reshape(b, -1, k).topk(1, 2)
        return value[..., 0], label[..., 0], *self._anchored(deltas, anchor, position, level)

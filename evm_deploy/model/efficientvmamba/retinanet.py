"""RetinaNet (arXiv 1708.02002) on an EfficientVMamba backbone, with the names and semantics of mmdet's RetinaNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.model.detection import Anchors, Selection
from evm_deploy.model.efficientvmamba.network import Architecture, EfficientVMambaBackbone
from evm_deploy.model.efficientvmamba.pyramid import ConvBlock, FeaturePyramid, PyramidSizes


@dataclass(frozen=True)
class HeadSizes:
    """Sizes of a RetinaNet head. stacked: convolutions before the last. anchors: of each position. classes: number."""

    channels: int
    feat_channels: int
    stacked: int
    anchors: int
    classes: int


class RetinaHead(nn.Module):
    """RetinaNet head: one stack of convolutions for class logits, one for box deltas, shared by all levels."""

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        widths = [sizes.channels, *[sizes.feat_channels] * sizes.stacked]
        pairs = list(pairwise(widths))
        self.cls_convs = nn.ModuleList(ConvBlock(inner, outer, 3) for inner, outer in pairs)
        self.reg_convs = nn.ModuleList(ConvBlock(inner, outer, 3) for inner, outer in pairs)
        self.retina_cls = nn.Conv2d(widths[-1], sizes.anchors * sizes.classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(widths[-1], sizes.anchors * 4, 3, padding=1)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map the levels (b, C, h, w) -> class logits (b, anchors * classes, h, w) of each, then deltas of each.

        In the channels the anchor is the slower index: logits [anchor, class], deltas (b, anchors * 4, h, w)
        [anchor, (dx, dy, dw, dh)].
        """
        logits, deltas = [], []
        for level in pyramid:
            x = y = level
            for classify, locate in zip(self.cls_convs, self.reg_convs, strict=True):
                x, y = classify(x), locate(y)
            logits.append(self.retina_cls(x))
            deltas.append(self.retina_reg(y))
        return (*logits, *deltas)


class RetinaNet(nn.Module):
    """RetinaNet detector up to its maps; `selection` gives the module that makes detections of the maps.

    anchors, before, min_size: as in `model.detection.Selection`.
    """

    def __init__(self, arch: Architecture, stages: Sequence[int], pyramid: PyramidSizes, head: HeadSizes) -> None:
        super().__init__()
        self.anchors, self.before, self.min_size = Anchors(), 1000, 0.0
        self.classes = head.classes
        first = min(stages) + 2
        levels = range(first, first + pyramid.levels)
        self.outputs = tuple(f"{kind}{level}" for kind in ("logits", "deltas") for level in levels)
        self.backbone = EfficientVMambaBackbone(arch, stages)
        self.neck = FeaturePyramid(pyramid)
        self.bbox_head = RetinaHead(head)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (b, 3, H, W) -> logits (b, anchors * classes, h, w) and deltas (b, anchors * 4, h, w).

        Returns the logits of every level, the finest first, then the deltas of every level.
        """
        maps: tuple[Tensor, ...] = self.bbox_head(self.neck(self.backbone(x)))
        return maps

    def selection(self, settings: SelectionSettings, size: tuple[int, int]) -> Selection:
        """Return the module that selects detections among the maps of images of `size` (H, W) in pixels."""
        return Selection(self.anchors, self.classes, settings, size, before=self.before, min_size=self.min_size)

"""Faster R-CNN (arXiv 1506.01497) and Mask R-CNN (arXiv 1703.06870) on EfficientVMamba, with mmdet's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.data.boxes import SelectionSettings
from evm_deploy.model.efficientvmamba.network import Architecture, EfficientVMambaBackbone
from evm_deploy.model.efficientvmamba.pyramid import ConvBlock, FeaturePyramid, PyramidSizes
from evm_deploy.model.regions import RegionSelection, RegionSettings


@dataclass(frozen=True)
class MaskSizes:
    """Sizes of a mask head. widths: channels of its input and of each 3x3 convolution. upsampled: of the transposed
    convolution. maps: number of classes, or 1 for one map of all classes.
    """

    widths: tuple[int, ...]
    upsampled: int
    maps: int


@dataclass(frozen=True)
class RegionSizes:
    """Sizes of the heads of Faster and Mask R-CNN.

    channels: of the pyramid. rpn: channels of the RPN. anchors: of each position. bins: of a region's crop. fcs:
    widths of the shared linear layers. classes: number, without the background. class_agnostic: one box for all
    classes. mask: None for Faster R-CNN.
    """

    channels: int
    rpn: int
    anchors: int
    bins: int
    fcs: tuple[int, ...]
    classes: int
    class_agnostic: bool = False
    mask: MaskSizes | None = None


class RpnHead(nn.Module):
    """Region proposal network, shared by all levels: one convolution, then logits and deltas of the anchors."""

    def __init__(self, sizes: RegionSizes) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(sizes.channels, sizes.rpn, 3, padding=1)
        self.rpn_cls = nn.Conv2d(sizes.rpn, sizes.anchors, 1)
        self.rpn_reg = nn.Conv2d(sizes.rpn, sizes.anchors * 4, 1)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map the levels (b, C, h, w) -> logits (b, anchors, h, w) of each, then deltas (b, anchors * 4, h, w)."""
        features = [F.relu(self.rpn_conv(level)) for level in pyramid]
        return (*map(self.rpn_cls, features), *map(self.rpn_reg, features))


class BoxHead(nn.Module):
    """Box head: linear layers on the crop of a region, then logits of the classes and deltas."""

    def __init__(self, sizes: RegionSizes) -> None:
        super().__init__()
        widths = [sizes.channels * sizes.bins**2, *sizes.fcs]
        self.shared_fcs = nn.ModuleList(nn.Linear(inner, outer) for inner, outer in pairwise(widths))
        self.fc_cls = nn.Linear(widths[-1], sizes.classes + 1)
        self.fc_reg = nn.Linear(widths[-1], 4 if sizes.class_agnostic else 4 * sizes.classes)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Map crops (m, C, bins, bins) -> logits (m, classes + 1), the background last, and deltas.

        deltas: (m, classes * 4) [class, (dx, dy, dw, dh)], or (m, 4) for all classes.
        """
        x = crops.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    """Mask head: convolutions on the crop of a region, doubled in size, then a map for each class."""

    def __init__(self, sizes: MaskSizes) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvBlock(inner, outer, 3) for inner, outer in pairwise(sizes.widths))
        self.upsample = nn.ConvTranspose2d(sizes.widths[-1], sizes.upsampled, 2, stride=2)
        self.conv_logits = nn.Conv2d(sizes.upsampled, sizes.maps, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops (m, C, bins, bins) -> logits (m, maps, 2 * bins, 2 * bins)."""
        x = crops
        for conv in self.convs:
            x = conv(x)
        logits: Tensor = self.conv_logits(F.relu(self.upsample(x)))
        return logits


class RoiHead(nn.Module):
    """Heads of the second stage: `bbox_head`, and `mask_head` of Mask R-CNN."""

    def __init__(self, sizes: RegionSizes) -> None:
        super().__init__()
        self.bbox_head = BoxHead(sizes)
        self.mask_head = MaskHead(sizes.mask) if sizes.mask else None


class RegionCNN(nn.Module):
    """Faster R-CNN or Mask R-CNN up to its dense maps; `selection` gives the module of the second stage.

    region: settings of the second stage. classes: number of classes.
    """

    def __init__(self, arch: Architecture, stages: Sequence[int], pyramid: PyramidSizes, sizes: RegionSizes) -> None:
        super().__init__()
        self.classes = sizes.classes
        self.region: RegionSettings
        self.backbone = EfficientVMambaBackbone(arch, stages)
        self.neck = FeaturePyramid(pyramid)
        self.rpn_head = RpnHead(sizes)
        self.roi_head = RoiHead(sizes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the maps that `forward` returns."""
        first = self.region.strides[0].bit_length() - 1
        proposing = range(first, first + len(self.region.anchors.strides))
        of_rpn = [f"{kind}{level}" for kind in ("logits", "deltas") for level in proposing]
        return (*of_rpn, *(f"level{first + i}" for i in range(len(self.region.strides))))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (b, 3, H, W) -> the RPN's logits and deltas of every level, and the pyramid's levels.

        The levels are those that regions are cropped from, the finest first.
        """
        pyramid = self.neck(self.backbone(x))
        return (*self.rpn_head(pyramid), *pyramid[: len(self.region.strides)])

    def selection(self, settings: SelectionSettings, size: tuple[int, int]) -> RegionSelection:
        """Return the module that selects detections among the regions of images of `size` (H, W) in pixels."""
        heads = self.roi_head
        return RegionSelection(self.region, self.classes, settings, size, heads.bbox_head, heads.mask_head)

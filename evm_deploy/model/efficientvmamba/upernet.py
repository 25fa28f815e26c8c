"""UPerNet (arXiv 1807.10221) on an EfficientVMamba backbone, with the names and semantics of mmseg's UPerHead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.model.efficientvmamba.network import Architecture, EfficientVMambaBackbone
from evm_deploy.model.efficientvmamba.pyramid import ConvBlock
from evm_deploy.model.resampling import bilinear_weights
from evm_deploy.model.segmentation import LabelSelection


@dataclass(frozen=True)
class UPerSizes:
    """Sizes of a UPerNet head.

    inputs: channels of the backbone maps that are used, the finest first. channels: of every map in the head. pools:
    sizes that the coarsest map is pooled to. classes: channels of the logits. align_corners: of every resize.
    """

    inputs: tuple[int, ...]
    channels: int
    pools: tuple[int, ...]
    classes: int
    align_corners: bool = False


class Resize(nn.Module):
    """Bilinear resize of a map, without antialiasing, exact on every runtime.

    Enlargements by a whole number are resizes in the artifact, too. Others are products with constant matrices, because
    runtimes derive the positions of the pixels differently.
    """

    def __init__(self, *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map (b, C, h, w) -> (b, C, height, width)."""
        h, w = (int(side) for side in x.shape[2:])
        if (h, w) == (height, width):
            return x
        times = height // h
        if not self.align_corners and (times * h, times * w) == (height, width):
            return F.interpolate(x, scale_factor=float(times), mode="bilinear", align_corners=False)
        rows, columns = (
            torch.from_numpy(bilinear_weights(old, new, align_corners=self.align_corners))
            for old, new in ((h, height), (w, width))
        )
        return torch.matmul(rows, torch.matmul(x, columns.T))


class UPerHead(nn.Module):
    """UPerNet head: pyramid pooling of the coarsest map, a feature pyramid, and logits at the size of the finest."""

    def __init__(self, sizes: UPerSizes) -> None:
        super().__init__()
        self.resize = Resize(align_corners=sizes.align_corners)
        channels, coarsest = sizes.channels, sizes.inputs[-1]

        def block(inner: int, kernel: int) -> ConvBlock:
            return ConvBlock(inner, channels, kernel, norm=True)

        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), block(coarsest, 1)) for pool in sizes.pools
        )
        self.bottleneck = block(coarsest + len(sizes.pools) * channels, 3)
        self.lateral_convs = nn.ModuleList(block(each, 1) for each in sizes.inputs[:-1])
        self.fpn_convs = nn.ModuleList(block(channels, 3) for _ in sizes.inputs[:-1])
        self.fpn_bottleneck = block(len(sizes.inputs) * channels, 3)
        self.conv_seg = nn.Conv2d(channels, sizes.classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map the used backbone maps (b, C_j, h_j, w_j), the finest first -> logits (b, classes, h_0, w_0)."""
        top = maps[-1]
        pooled = [self._like(module(top), top) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + self._like(levels[i], levels[i - 1])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)] + levels[-1:]
        joined = torch.cat([self._like(x, outs[0]) for x in outs], 1)
        logits: Tensor = self.conv_seg(self.fpn_bottleneck(joined))
        return logits

    def _like(self, x: Tensor, other: Tensor) -> Tensor:
        height, width = (int(side) for side in other.shape[2:])
        resized: Tensor = self.resize(x, height, width)
        return resized


class UPerNet(nn.Module):
    """UPerNet segmenter up to its logits; `selection` gives the module that makes label maps of the logits.

    stages: numbers of the backbone's stages whose maps are used, in order. threshold: of a head with one class.
    """

    outputs = ("logits",)

    def __init__(self, arch: Architecture, stages: Sequence[int], sizes: UPerSizes) -> None:
        super().__init__()
        self.sizes, self.threshold = sizes, 0.3
        self.backbone = EfficientVMambaBackbone(arch, stages)
        self.decode_head = UPerHead(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (b, 3, H, W) -> logits (b, classes, h, w), a quarter as high and wide with stage 0."""
        logits: Tensor = self.decode_head(self.backbone(x))
        return logits

    def selection(self, settings: Any, size: tuple[int, int]) -> LabelSelection:
        """Return the module that gives every pixel of images of `size` (H, W) its class. settings: not used."""
        maps = self.backbone.map_size(size, self.backbone.stages[0])
        return LabelSelection(
            self.sizes.classes,
            maps,
            size,
            align_corners=self.sizes.align_corners,
            threshold=self.threshold,
            reads="decode_head.conv_seg",
        )

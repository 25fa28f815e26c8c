"""Feature pyramid network (arXiv 1612.03144) with the names and semantics of mmdet's FPN, and its convolution block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ExtraLevels = Literal["on_input", "on_lateral", "on_output", "pooled", "none"]


@dataclass(frozen=True)
class PyramidSizes:
    """Sizes of a feature pyramid.

    inputs: channels of the backbone maps that are used, the finest first. channels: of every level. levels: number of
    levels that leave the pyramid. extra: source of the levels beyond the inputs: stride-2 convolutions `on_input` (the
    coarsest backbone map), `on_lateral` or `on_output`, each of the level before it; or `pooled` (every second pixel).
    relu_before_extra: whether a ReLU stands before each extra convolution but the first.
    """

    inputs: tuple[int, ...]
    channels: int
    levels: int
    extra: ExtraLevels = "none"
    relu_before_extra: bool = False


class ConvBlock(nn.Module):
    """Convolution and ReLU: `conv` with bias, or `conv` without bias and `bn`, as mmcv's ConvModule names them."""

    def __init__(
        self, inner: int, outer: int, kernel: int, *, stride: int = 1, norm: bool = False, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(outer)
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, inner, H, W) -> (b, outer, ceil(H / stride), ceil(W / stride))."""
        x = self.conv(x)
        x = self.bn(x) if self.norm else x
        return F.relu(x) if self.relu else x


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Upsample (b, C, h, w) -> (b, C, height, width) to at most twice its size: source index = floor(i in / out).

    Twice the size is the common case. Other sizes are gathers, because runtimes round differently in a resize.
    """
    h, w = (int(side) for side in x.shape[2:])
    if (height, width) == (2 * h, 2 * w):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    rows, columns = (torch.arange(out) * side // out for out, side in ((height, h), (width, w)))
    return x[:, :, rows][:, :, :, columns]


class FeaturePyramid(nn.Module):
    """Feature pyramid: lateral 1x1 convolutions, top-down sums, 3x3 convolutions, extra coarser levels."""

    def __init__(self, sizes: PyramidSizes) -> None:
        super().__init__()
        self.sizes = sizes
        channels, used = sizes.channels, len(sizes.inputs)
        self.lateral_convs = nn.ModuleList(ConvBlock(each, channels, 1, relu=False) for each in sizes.inputs)
        more = 0 if sizes.extra in ("pooled", "none") else sizes.levels - used
        first = sizes.inputs[-1] if sizes.extra == "on_input" else channels
        extra = [first, *[channels] * more][:more]
        self.fpn_convs = nn.ModuleList(
            [
                *(ConvBlock(channels, channels, 3, relu=False) for _ in sizes.inputs),
                *(ConvBlock(each, channels, 3, stride=2, relu=False) for each in extra),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map the used backbone maps (b, C_j, h_j, w_j) -> `levels` maps (b, channels, h, w), the finest first.

        A map is upsampled to the size of the finer one, which may be odd (`nearest`).
        """
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            height, width = (int(side) for side in laterals[i - 1].shape[2:])
            laterals[i - 1] = laterals[i - 1] + nearest(laterals[i], height, width)
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        if self.sizes.extra == "pooled":
            while len(outs) < self.sizes.levels:
                outs.append(outs[-1][:, :, ::2, ::2])
            return outs
        x = {"on_input": maps[-1], "on_lateral": laterals[-1]}.get(self.sizes.extra, outs[-1])
        for i, conv in enumerate(list(self.fpn_convs)[len(laterals) :]):
            x = conv(F.relu(x) if i and self.sizes.relu_before_extra else x)
            outs.append(x)
        return outs

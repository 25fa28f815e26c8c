"""EfficientVMamba (arXiv 2403.09977): the classifier, and the backbone of detectors and segmenters.

`state_dict()` has exactly the keys of the authors' checkpoints. The network is for inference only: it has no dropout
and no drop path. Activations are NHWC in stages 0 and 1, and NCHW inside stages 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evm_deploy.model.efficientvmamba.blocks import EVSSBlock, InvertedResidual, PatchMerging, Permute, to_nchw


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network, inferred from a checkpoint's shapes.

    dim: channels of the patch embedding. num_classes: 0 if there is no classifier head. channels: of the input image.
    """

    dim: int
    depths: tuple[int, int, int, int]
    num_classes: int
    dt_ranks: tuple[int, int]  # rank of dt in stages 0 and 1; ceil(C / 16) in every released model
    d_state: int = 16
    channels: int = 3

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """Channels of the four stages."""
        return self.dim, 2 * self.dim, 4 * self.dim, 8 * self.dim

    @property
    def variant(self) -> str:
        """Name of the published size (`tiny`, `small`, `base`) with these widths and depths, else `custom`."""
        published = {(48, (2, 2, 4, 2)): "tiny", (64, (2, 2, 4, 2)): "small", (96, (2, 2, 9, 2)): "base"}
        return published.get((self.dim, self.depths), "custom")


class ScanStage(nn.Module):
    """Stages 0 and 1: EVSS blocks and a downsampling, which `forward` leaves to `Trunk.maps`."""

    def __init__(self, dim: int, depth: int, dt_rank: int, d_state: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EVSSBlock(dim, dt_rank, d_state) for _ in range(depth))
        self.downsample = PatchMerging(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks, without the downsampling: (b, H, W, C) -> (b, H, W, C)."""
        for block in self.blocks:
            x = block(x)
        return x


class ConvStage(nn.Sequential):
    """Stages 2 and 3 as one numbered list: permute, inverted residuals, permute and, in stage 2, the downsampling."""

    def __init__(self, dim: int, depth: int, *, downsample: bool) -> None:
        blocks: list[nn.Module] = [InvertedResidual(dim) for _ in range(depth)]
        last: list[nn.Module] = [PatchMerging(dim)] if downsample else []
        super().__init__(Permute(0, 3, 1, 2), *blocks, Permute(0, 2, 3, 1), *last)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """Apply the residuals, without the downsampling: (b, H, W, C) -> (b, H, W, C)."""
        for module in list(self)[: self.depth + 2]:
            x = module(x)
        return x

    @property
    def downsample(self) -> nn.Module | None:
        """Downsampling after the stage, or None for the last stage."""
        return self[self.depth + 2] if len(self) > self.depth + 2 else None


class Classifier(nn.Module):
    """Classifier head: LayerNorm of every position, mean over the map, linear layer."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, H, W, C) -> logits (b, classes)."""
        out: Tensor = self.head(self.norm(x).mean((1, 2)))
        return out


class Trunk(nn.Module):
    """Patch embedding and the four stages, shared by the classifier and the backbone."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        dims = arch.dims
        self.patch_embed = nn.Sequential(
            nn.Conv2d(arch.channels, arch.dim, 4, stride=4), Permute(0, 2, 3, 1), nn.LayerNorm(arch.dim)
        )
        self.layers = nn.ModuleList(
            [
                ScanStage(dims[0], arch.depths[0], arch.dt_ranks[0], arch.d_state),
                ScanStage(dims[1], arch.depths[1], arch.dt_ranks[1], arch.d_state),
                ConvStage(dims[2], arch.depths[2], downsample=True),
                ConvStage(dims[3], arch.depths[3], downsample=False),
            ]
        )

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the maps of the four stages before downsampling, NHWC, with strides 4, 8, 16 and 32.

        x: normalised images (b, channels, H, W).
        """
        x = self.patch_embed(x)
        maps = []
        for stage in self.layers:
            maps.append(stage(x))
            downsample: Any = stage.downsample
            x = downsample(maps[-1]) if downsample is not None else maps[-1]
        return maps


class EfficientVMamba(Trunk):
    """EfficientVMamba classifier. Source: arXiv 2403.09977."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch)
        self.classifier = Classifier(arch.dims[3], arch.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (b, channels, H, W), float32, H and W at least 4 -> logits (b, classes)."""
        out: Tensor = self.classifier(self.maps(x)[-1])
        return out


class EfficientVMambaBackbone(Trunk):
    """EfficientVMamba backbone for detection and segmentation heads: returns normalised feature maps.

    stages: numbers of the stages whose maps are returned, in order.
    """

    def __init__(self, arch: Architecture, stages: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__(arch)
        self.stages = tuple(stages)
        for i in self.stages:
            self.add_module(f"outnorm{i}", nn.LayerNorm(arch.dims[i]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map normalised images (b, channels, H, W) -> a map (b, C, h, w) for each of `stages`, of strides 4 to 32."""
        maps = self.maps(x)
        return tuple(to_nchw(self.get_submodule(f"outnorm{i}")(maps[i])) for i in self.stages)

    def map_size(self, size: tuple[int, int], stage: int) -> tuple[int, int]:
        """Return the size (h, w) of a stage's map for images of `size` (H, W): a part of a patch is left out.

        An odd side is halved upwards.
        """
        height, width = (-(-(side // 4) // 2**stage) for side in size)
        return height, width

"""Stand-ins for the orders in which networks scan the tokens of an image, without writes into a part of a tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_scan(x: Tensor, in_channel_first: bool = True, out_channel_first: bool = True) -> Tensor:
    """Stand in for VMamba's cross scan: rows, columns, and both from the end.

    x: (b, C, H, W), or (b, H, W, C). Returns (b, 4, C, L), or (b, L, 4, C).
    """
    if not in_channel_first:
        x = x.permute(0, 3, 1, 2)
    forth = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    y = torch.cat([forth, forth.flip(-1)], 1)
    return y if out_channel_first else y.permute(0, 3, 1, 2).contiguous()


def local_scan(x: Tensor, K: int, flip: bool, H: int | None = None, W: int | None = None) -> Tensor:
    """Stand in for LocalMamba's scan of windows of K x K pixels: rows inside a window, window after window.

    x: (b, C, H, W), or (b, C, H W) with H and W given. The last windows are padded with zeros.
    """
    flat = x.dim() == 3
    height, width = (H, W) if H and W else x.shape[-2:]
    b, c = x.shape[:2]
    x = F.pad(x.reshape(b, c, height, width), (0, -width % K, 0, -height % K))
    height, width = x.shape[-2:]
    y = x.reshape(b, c, height // K, K, width // K, K).transpose(3, 4).reshape(b, c, height * width)
    y = y.flip([-1]) if flip else y
    return y if flat else y.reshape(b, c, height, width)


def local_reverse(x: Tensor, K: int, flip: bool, H: int | None = None, W: int | None = None) -> Tensor:
    """Stand in for the inverse of `local_scan`. H, W: size of the image without the padding."""
    flat = x.dim() == 3
    height, width = (H, W) if H and W else x.shape[-2:]
    b, c, rows, columns = *x.shape[:2], -(-height // K), -(-width // K)
    x = x.reshape(b, c, rows * columns * K * K)
    x = x.flip([-1]) if flip else x
    x = x.reshape(b, c, rows, columns, K, K).transpose(3, 4).reshape(b, c, rows * K, columns * K)
    x = x[:, :, :height, :width]
    return x.flatten(2) if flat else x

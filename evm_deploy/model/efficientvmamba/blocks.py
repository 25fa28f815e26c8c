"""Blocks of EfficientVMamba (arXiv 2403.09977), written for export: MatMul projections, reshape + permute scans.

Activations are channels last. No tensor has more than 5 axes, the limit of Core ML. The code is written from the
architecture description alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.model.batch_norm import folded_modules
from evm_deploy.scan.fused import FusedOp
from evm_deploy.scan.op import selective_scan

DIRECTIONS = 4  # one per phase of the 2 x 2 atrous grid


def to_nchw(x: Tensor) -> Tensor:
    """Permute (b, H, W, C) -> (b, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: Tensor) -> Tensor:
    """Permute (b, C, H, W) -> (b, H, W, C)."""
    return x.permute(0, 2, 3, 1)


class Permute(nn.Module):
    """Permutation of axes as a module without parameters; keeps the numbers of the authors' modules."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """Permute the axes of x to `order`."""
        return x.permute(self.order)


def split_directions(x: Tensor) -> Tensor:
    """Split a map into four scan sequences (atrous): (b, d, H, W), H and W even -> (b, 4, L, d), L = H W / 4.

    Direction k reads phase (row k % 2, column k // 2) of the 2 x 2 grid. Even k read it row-major, odd k column-major.
    """
    b, d, H, W = x.shape
    x = x.reshape(b, d, H // 2, 2, W)
    even_rows, odd_rows = (x[:, :, :, row].reshape(b, d, H // 2, W // 2, 2) for row in (0, 1))
    by_row = even_rows.permute(0, 4, 2, 3, 1).reshape(b, 2, -1, d)
    by_column = odd_rows.permute(0, 4, 3, 2, 1).reshape(b, 2, -1, d)
    return torch.stack([by_row, by_column], 2).reshape(b, DIRECTIONS, -1, d)


def merge_directions(y: Tensor, H: int, W: int) -> Tensor:
    """Merge four scan sequences into a map, the inverse of `split_directions`: (b, 4, L, d) -> (b, H, W, d).

    H and W are even.
    """
    b, d = y.shape[0], y.shape[3]
    h, w = H // 2, W // 2
    y = y.reshape(b, 2, 2, h * w, d)
    even_rows = y[:, :, 0].reshape(b, 2, h, w, d).permute(0, 2, 3, 1, 4).reshape(b, h, W, d)
    odd_rows = y[:, :, 1].reshape(b, 2, w, h, d).permute(0, 3, 2, 1, 4).reshape(b, h, W, d)
    return torch.stack([even_rows, odd_rows], 2).reshape(b, H, W, d)


class ES2D(nn.Module):
    """Efficient 2D scan: (b, H, W, C) -> (b, H, W, C), inner width d = 2 C."""

    def __init__(self, dim: int, dt_rank: int, d_state: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.dt_rank, self.d_state = dt_rank, d_state
        self.x_proj_weight = nn.Parameter(torch.zeros(DIRECTIONS, dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.zeros(DIRECTIONS, inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.zeros(DIRECTIONS, inner))
        self.A_logs = nn.Parameter(torch.zeros(DIRECTIONS * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, n: Tensor) -> Tensor:
        """Compute in_proj, depthwise convolution, scan in four directions, out_norm, gate and out_proj."""
        H, W = n.shape[1:3]
        x, z = self.in_proj(n).chunk(2, dim=-1)
        x = F.silu(self.conv2d(to_nchw(x)))
        if H % 2 or W % 2:  # zeros after the activation; the padded tokens take part in the scan, as in the original
            x = F.pad(x, (0, W % 2, 0, H % 2))
        y = merge_directions(self.scan(split_directions(x)), H + H % 2, W + W % 2)
        y = self.out_norm(y[:, :H, :W])
        out: Tensor = self.out_proj(y * F.silu(z))
        return out

    def scan(self, u: Tensor) -> Tensor:
        """Project u (b, 4, L, d) to delta, B and C and run the selective scan -> (b, 4, L, d).

        The scan computes in float32; the result has the dtype of u.
        """
        dt, B, C = torch.split(self.project(u), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = torch.matmul(dt, self.dt_projs_weight.transpose(1, 2))
        (A, skip), bias = self.scan_constants(), self.dt_projs_bias.float()
        y: Tensor = selective_scan(u.float(), delta.float(), A, B.float(), C.float(), skip, bias)
        return y.to(u.dtype)

    def project(self, u: Tensor) -> Tensor:
        """Multiply u (b, 4, L, d) by x_proj -> dt, B and C side by side, (b, 4, L, R + 2 N)."""
        return torch.matmul(u, self.x_proj_weight.transpose(1, 2))

    def scan_constants(self) -> tuple[Tensor, Tensor]:
        """Return A (4, d, N), negative, and skip (4, d), both float32."""
        A = -torch.exp(self.A_logs.float()).reshape(DIRECTIONS, -1, self.d_state)
        return A, self.Ds.float().reshape(DIRECTIONS, -1)


class Gate(nn.Module):
    """Channel gate of an EVSS block: scales (b, H, W, C) by one factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = nn.Linear(dim, dim // 8)
        self.channel_select = nn.Linear(dim // 8, dim)

    def forward(self, t: Tensor) -> Tensor:
        """Multiply t by sigmoid(channel_select(GELU(global_reduce(mean of the normalised tokens))))."""
        g = self.norm(t).mean((1, 2), keepdim=True)
        gated: Tensor = t * torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(g))))
        return gated


class EVSSBlock(nn.Module):
    """EVSS block: a scan branch and a convolution branch read the same normalised input and share one gate."""

    def __init__(self, dim: int, dt_rank: int, d_state: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = ES2D(dim, dt_rank, d_state)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU(), nn.Conv2d(dim, dim, 1)
        )
        self.se = Gate(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus both gated branches, (b, H, W, C)."""
        n = self.norm(x)
        local = to_nhwc(self.conv_branch(to_nchw(n)))
        out: Tensor = x + (self.se(self.op(n)) + self.se(local))
        return out

    def fused_op(self) -> FusedOp:
        """Return the whole block as the op evm::EVSSBlock (native/scan/evm_block.h), with BatchNorm folded."""
        op, gate, (local_conv, local_norm, _, local_proj) = self.op, self.se, self.conv_branch
        local_weight, local_bias = folded_modules(local_conv, local_norm)
        A, skip = op.scan_constants()
        operands: dict[str, Any] = {
            "norm_weight": self.norm.weight,
            "norm_bias": self.norm.bias,
            "in_proj": op.in_proj.weight.T,
            "conv_weight": op.conv2d.weight,
            "conv_bias": op.conv2d.bias,
            "x_proj": op.x_proj_weight.transpose(1, 2),
            "dt_proj": op.dt_projs_weight.transpose(1, 2),
            "A": A,
            "skip": skip,
            "dt_bias": op.dt_projs_bias,
            "out_norm_weight": op.out_norm.weight,
            "out_norm_bias": op.out_norm.bias,
            "out_proj": op.out_proj.weight.T,
            "local_conv_weight": local_weight,
            "local_conv_bias": local_bias,
            "local_proj_weight": local_proj.weight,
            "local_proj_bias": local_proj.bias,
            "gate_norm_weight": gate.norm.weight,
            "gate_norm_bias": gate.norm.bias,
            "gate_reduce_weight": gate.global_reduce.weight.T,
            "gate_reduce_bias": gate.global_reduce.bias,
            "gate_select_weight": gate.channel_select.weight.T,
            "gate_select_bias": gate.channel_select.bias,
        }
        layers = {"in_proj": "op.in_proj", "out_proj": "op.out_proj", "local_proj_weight": "conv_branch.3"}
        int8 = frozenset(layers)
        return FusedOp(
            "EVSSBlock",
            operands,
            scan="op",
            scan_constants={"A": "A", "skip": "skip", "bias": "dt_bias"},
            int8_layers=layers,
            int8_scan_inputs=frozenset({"x_proj"}),
            int8_types={int8: "EVSSBlockInt8", int8 | {"x_proj"}: "EVSSBlockInt8XProj"},
        )


class PatchMerging(nn.Module):
    """Patch merging, NHWC: halves H and W, doubles the channels; pads odd sizes with zeros, bottom and right."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, H, W, C) -> (b, ceil(H / 2), ceil(W / 2), 2 C)."""
        b, H, W, C = x.shape
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        h, w = (H + 1) // 2, (W + 1) // 2
        x = x.reshape(b * h, 2, w, 2, C).permute(0, 2, 3, 1, 4).reshape(b, h, w, 4 * C)  # column phase outer
        out: Tensor = self.reduction(self.norm(x))
        return out


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation of an inverted residual, NCHW."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, dim // 8, 1)
        self.conv_expand = nn.Conv2d(dim // 8, dim, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Scale the channels of h (b, C, H, W) by factors computed from their means."""
        g = F.relu(self.conv_reduce(h.mean((2, 3), keepdim=True)))
        return h * torch.sigmoid(self.conv_expand(g))


class InvertedResidual(nn.Module):
    """Inverted residual, NCHW: 1x1 up to 4 C, depthwise 3x3, squeeze-excite, 1x1 down to C, residual; ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv_pw = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU())
        self.conv_dw = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()
        )
        self.se = SqueezeExcite(hidden)
        self.conv_pw2 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, C, H, W) -> (b, C, H, W)."""
        out: Tensor = x + self.conv_pw2(self.se(self.conv_dw(self.conv_pw(x))))
        return out

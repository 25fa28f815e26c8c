"""A package as people write it for CUDA, with kernels and copies of its own: the rarer entry points.

Import it within `evm_deploy.cpu_mamba()` only. Blocks are those of tests/foreign_package.py.
"""

from __future__ import annotations

import selective_scan_cuda_oflex
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from dwconv2d import dwconv2d_fp32
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
from mamba_ssm.ops.triton.layernorm import RMSNorm as OldRMSNorm
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
from selective_scan_vmamba import selective_scan_cuda_core
from torch import nn

from tests import foreign_package
from tests.foreign_package import WIDTH, Block


@triton.jit
def shuffle_kernel(x, y, size: tl.constexpr):
    tl.store(y, tl.load(x))


class LocalScanTriton(torch.autograd.Function):
    """LocalMamba's windows: the kernel is launched on every device."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, K: int, flip: bool, H: int | None = None, W: int | None = None):
        y = torch.empty_like(x)
        shuffle_kernel[(1,)](x, y, K)
        return y


class LocalReverseTriton(LocalScanTriton):
    pass


class MambaChunkScanCombinedFn(torch.autograd.Function):
    """VMamba's copy of an early Mamba-2: the arguments have another order than in today's mamba_ssm."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
                dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False):  # fmt: skip
        out = torch.empty_like(x)
        shuffle_kernel[(1,)](x, out, chunk_size)
        return out


class Windows(Block):
    """One direction inside windows of 3 x 3, the other from the end, as in LocalMamba."""

    def __init__(self):
        super().__init__(groups=2)

    def forward(self, x):
        height = 4 if x.shape[1] % 4 == 0 else 1
        u = self.in_proj(self.norm(x))[..., :WIDTH].transpose(1, 2)
        size = (height, x.shape[1] // height)
        xs = torch.stack([LocalScanTriton.apply(u.contiguous(), 3, flip, *size) for flip in (False, True)], 1)
        projected = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj.weight.unflatten(0, (2, -1)))
        dt, B, C = torch.split(projected, [foreign_package.RANK, self.states, self.states], 2)
        delta = torch.einsum("bkrl,dr->bkdl", dt, self.dt_proj.weight)
        A = -torch.exp(self.A_log)
        ys, _ = selective_scan_cuda_oflex.fwd(
            xs.flatten(1, 2), delta.flatten(1, 2), A, B.contiguous(), C.contiguous(), self.D, self.bias, True, 1, True
        )
        ys = ys.unflatten(1, (2, -1))
        y = sum(LocalReverseTriton.apply(ys[:, i].contiguous(), 3, bool(i), *size) for i in (0, 1))
        return x + self.out_proj(y.transpose(1, 2))


class ByVmamba(Block):
    def mix(self, u, z, delta, A, B, C):
        return selective_scan_cuda_core.fwd(u, delta, A, B, C, self.D, self.bias, True, 1)[0] * F.silu(z)


class OwnChunks(foreign_package.Mamba2):
    """Mamba-2 by a copy of its kernels, called from the end and asked for its last states, as by VMamba."""

    def __init__(self):
        super().__init__(fused=False)

    def forward(self, x):
        z, xBC, dt = torch.split(self.in_proj(x), [WIDTH, self.conv1d.in_channels, self.heads], -1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        u, B, C = torch.split(xBC, [WIDTH, *[self.groups * self.states] * 2], -1)
        found = MambaChunkScanCombinedFn.apply(
            u.unflatten(-1, (self.heads, -1)), F.softplus(dt + self.dt_bias), -torch.exp(self.A_log),
            B.unflatten(-1, (self.groups, -1)), C.unflatten(-1, (self.groups, -1)), 256, self.D, None, None, None,
            None, False, (0.0, float("inf")), True,
        )  # fmt: skip
        y, last = found
        return x + self.out_proj(y.view(*x.shape) * F.silu(z)) + last.mean((1, 2, 3))[:, None, None]


class Simple(nn.Module):
    """mamba_ssm's module under its full name, with Vim's first bidirectional form."""

    def __init__(self):
        super().__init__()
        self.mamba = Mamba(WIDTH, d_state=4, expand=2, bimamba_type="v1", init_layer_scale=0.5)

    def forward(self, x):
        return x + self.mamba(x)


class OldNorms(nn.Module):
    """Norms under their old module name, and as functions; a depthwise convolution of Spatial-Mamba."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = OldRMSNorm(WIDTH, eps=1e-5), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.filter = nn.Parameter(torch.randn(WIDTH, 1, 3, 3) / 3)

    def forward(self, x):
        y = rms_norm_fn(self.norm(x), self.weight, None, residual=x, eps=1e-5)
        y = rmsnorm_fn(y, self.weight, None, z=x, eps=1e-5, group_size=None, norm_before_gate=True)
        image = y.transpose(1, 2).unflatten(2, (1, -1))
        return y + dwconv2d_fp32(image.contiguous(), self.filter, 1, 1).flatten(2).transpose(1, 2)


BLOCKS = {
    "windows": Windows,
    "by_vmamba": ByVmamba,
    "own_chunks": OwnChunks,
    "simple": Simple,
    "old_norms": OldNorms,
}

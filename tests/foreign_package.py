"""A package as people write it for CUDA: each block uses other names that a CPU machine does not have.

Import it within `evm_deploy.cpu_mamba()` only. Blocks are (b, L, C) -> (b, L, C).
"""

from __future__ import annotations

import causal_conv1d_cuda
import selective_scan_cuda
import selective_scan_cuda_core
import selective_scan_cuda_ndstate
import selective_scan_cuda_nrow
import selective_scan_cuda_oflex
import selective_scan_cuda_oflex_rh
import torch
import torch.nn.functional as F
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.cpp_functions import causal_conv1d_fwd_function
from mamba_ssm import Mamba
from mamba_ssm.ops.selective_scan_interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
)
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from selective_scan import selective_scan_fn as second_try
from selective_scan_vmamba_pt202 import selective_scan_cuda_core as third_try
from torch import nn

try:
    import triton
except ImportError:
    triton = None

WIDTH, STATES, RANK = 16, 4, 3


class CrossScan(torch.autograd.Function):
    """Four orders of the pixels, written into an empty tensor in place."""

    @staticmethod
    def forward(ctx, x):
        b, c, h, w = x.shape
        ctx.shape = x.shape
        ctx.save_for_backward(x)
        y = x.new_empty((b, 4, c, h * w))
        y[:, 0, :, :] = x.flatten(2, 3)
        y[:, 1, :, :] = x.transpose(2, 3).flatten(2, 3)
        y[:, 2:4, :, :] = torch.flip(y[:, 0:2, :, :], dims=[-1])
        return y


class CrossMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        b, _, c, h, w = y.shape
        y = y.view(b, 4, c, -1)
        y = y[:, 0:2] + y[:, 2:4].flip(dims=[-1])
        return y[:, 0] + y[:, 1].view(b, c, w, h).transpose(2, 3).contiguous().view(b, c, -1)


class SelectiveScan(torch.autograd.Function):
    """The usual wrapper of a compiled kernel."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, u, delta, A, B, C, D, bias):
        out, x = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)
        ctx.save_for_backward(u, delta, A, B, C, D, bias, x)
        return out


class Block(nn.Module):
    """Everything of a Mamba layer but the scan. groups: of B and C. channels: D of each group."""

    def __init__(self, states=STATES, groups=1):
        super().__init__()
        self.states, self.groups = states, groups
        self.norm = nn.LayerNorm(WIDTH)
        self.in_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.x_proj = nn.Linear(WIDTH, groups * (RANK + 2 * states), bias=False)
        self.dt_proj = nn.Linear(RANK, WIDTH)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(groups * WIDTH, 1))
        self.D = nn.Parameter(torch.full((groups * WIDTH,), 0.1))
        self.bias = nn.Parameter(torch.linspace(-3, 0.5, groups * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        u, z = (part.transpose(1, 2) for part in self.in_proj(self.norm(x)).chunk(2, -1))
        projected = self.x_proj(u.transpose(1, 2)).transpose(1, 2).unflatten(1, (self.groups, -1))
        dt, B, C = torch.split(projected, [RANK, self.states, self.states], 2)
        delta = torch.einsum("bgrl,dr->bgdl", dt, self.dt_proj.weight).flatten(1, 2)
        y = self.mix(u, z, delta.contiguous(), -torch.exp(self.A_log), B.contiguous(), C.contiguous())
        return x + self.out_proj(y.transpose(1, 2))


class Interface(Block):
    def mix(self, u, z, delta, A, B, C):
        return selective_scan_fn(u, delta, A, B.squeeze(1), C.squeeze(1), self.D, z, self.bias, delta_softplus=True)


class Softplused(Block):
    """Softplus done by the caller; neither D nor a bias."""

    def mix(self, u, z, delta, A, B, C):
        dt = F.softplus(delta + self.bias[:, None])
        return second_try(u, dt, A, B, C) * F.silu(z)


class Compiled(Block):
    def mix(self, u, z, delta, A, B, C):
        _, _, gated = selective_scan_cuda.fwd(u, delta, A, B, C, self.D, z, self.bias, True)
        return gated


class Core(Block):
    def mix(self, u, z, delta, A, B, C):
        y, _ = selective_scan_cuda_core.fwd(u, delta, A, B, C, self.D, self.bias, True, 1)
        third, _ = third_try.fwd(u, delta, A, B, C, None, None, True, 1)
        return y + third


class Nrow(Block):
    def mix(self, u, z, delta, A, B, C):
        return selective_scan_cuda_nrow.fwd(u, delta, A, B, C, self.D, self.bias, True, 1)[0]


class NoStateAxis(Block):
    def mix(self, u, z, delta, A, B, C):
        return selective_scan_cuda_ndstate.fwd(u, delta, A[:, 0], B[:, :, 0], C[:, :, 0], self.D, self.bias, True, 1)[0]


class States(Block):
    """Spatial-Mamba: the states come out of the scan, and C comes after."""

    def mix(self, u, z, delta, A, B, C):
        h, _ = selective_scan_cuda_oflex_rh.fwd(u, delta, A, B, self.D, self.bias, True, 1, True)
        return (h * C.unsqueeze(1).flatten(1, 2)).sum(2) + self.D[:, None] * u


class Vmamba(Block):
    """Four directions over the image, one state: the form of VMamba's released models."""

    def __init__(self):
        super().__init__(states=1, groups=4)

    def forward(self, x):
        b, length, _ = x.shape
        height = 4 if length % 4 == 0 else 1
        image = self.in_proj(self.norm(x))[..., :WIDTH].transpose(1, 2).unflatten(2, (height, -1))
        xs = CrossScan.apply(image)
        dbl = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj.weight.unflatten(0, (4, -1)))
        dt, B, C = torch.split(dbl, [RANK, 1, 1], 2)
        delta = torch.einsum("bkrl,dr->bkdl", dt, self.dt_proj.weight)
        A = -torch.exp(self.A_log)
        ys = SelectiveScan.apply(
            xs.view(b, -1, length), delta.contiguous().view(b, -1, length), A, B.contiguous(), C.contiguous(), self.D,
            self.bias,
        )  # fmt: skip
        y = CrossMerge.apply(ys.view(b, 4, -1, height, length // height))
        return x + self.out_proj(y.transpose(1, 2))


class Inner(Block):
    """The fused functions of mamba_ssm and Vim."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.conv1d = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)
        self.A_b_log = nn.Parameter(self.A_log.detach() + 0.1)

    def forward(self, x):
        xz = self.in_proj(self.norm(x)).transpose(1, 2)
        A, A_b = -torch.exp(self.A_log), -torch.exp(self.A_b_log)
        first = (xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight)
        last = (None, None, self.D, self.bias)
        if self.form == "no_out_proj":
            y = mamba_inner_fn_no_out_proj(*first, A, *last, delta_softplus=True)
            return x + self.out_proj(y.transpose(1, 2))
        out = (self.out_proj.weight, None)
        if self.form == "bimamba":
            return x + bimamba_inner_fn(*first, *out, A, A_b, *last, delta_softplus=True)
        return x + mamba_inner_fn(*first, *out, A, *last, delta_softplus=True)


class Module(nn.Module):
    """mamba_ssm's module, one for two calls."""

    def __init__(self, **kind):
        super().__init__()
        self.mamba = Mamba(WIDTH, d_state=STATES, d_conv=4, expand=1, **kind)

    def forward(self, x):
        return x + self.mamba(x) + self.mamba(x.flip(1)).flip(1)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, 4) / 2), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        u = x.transpose(1, 2)
        y = causal_conv1d_fn(u, self.weight, self.bias, activation="silu")
        y = y + causal_conv1d_fwd_function(u, self.weight, self.bias, None, None, None, False)
        y = y + causal_conv1d_cuda.causal_conv1d_fwd(u, self.weight, self.bias, None, True)
        return x + y.transpose(1, 2)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.rms, self.gated = RMSNorm(WIDTH), RMSNormGated(WIDTH, group_size=8, norm_before_gate=False)
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        y, residual = self.rms(x, x / 2, prenorm=True, residual_in_fp32=True)
        y = layer_norm_fn(y, self.weight, self.bias, residual, eps=1e-5)
        return x + self.gated(y, residual)


class Mamba2(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused, self.heads, groups, states = fused, 4, 2, 8
        self.groups, self.states = groups, states
        conv = WIDTH + 2 * groups * states
        self.in_proj = nn.Linear(WIDTH, WIDTH + conv + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv, conv, 4, groups=conv, padding=3)
        self.dt_bias = nn.Parameter(torch.linspace(-3, 0.5, self.heads))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, self.heads + 1)))
        self.D = nn.Parameter(torch.full((self.heads,), 0.1))
        self.norm = RMSNormGated(WIDTH, norm_before_gate=False)
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        zxbcdt, A = self.in_proj(x), -torch.exp(self.A_log)
        if self.fused:
            return x + mamba_split_conv1d_scan_combined(
                zxbcdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, A, D=self.D, chunk_size=256,
                rmsnorm_weight=self.norm.weight, rmsnorm_eps=1e-5, outproj_weight=self.out_proj.weight,
                headdim=WIDTH // self.heads, ngroups=self.groups, norm_before_gate=False,
            )  # fmt: skip
        sizes = [WIDTH, self.conv1d.in_channels, self.heads]
        z, xBC, dt = torch.split(zxbcdt, sizes, -1)
        xBC = causal_conv1d_fn(xBC.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        u, B, C = torch.split(xBC.transpose(1, 2), [WIDTH, *[self.groups * self.states] * 2], -1)
        y = mamba_chunk_scan_combined(
            u.unflatten(-1, (self.heads, -1)), dt, A, B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)), chunk_size=256, D=self.D, dt_bias=self.dt_bias, dt_softplus=True,
            dt_limit=(0.0, 3.0),
        )  # fmt: skip
        return x + self.out_proj(self.norm(y.flatten(-2), z))


def selective_scan_torch(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
    """The package's own slow form, which it takes on a CPU."""
    G = B.shape[1]
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    B, C = (x.repeat_interleave(u.shape[1] // G, 1) for x in (B, C))
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta[..., t] * u[..., t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    return y if D is None else y + D[:, None] * u


class OwnLoop(Block):
    def mix(self, u, z, delta, A, B, C):
        return selective_scan_torch(u, delta, A, B, C, self.D, self.bias)


BLOCKS = {
    "interface": Interface,
    "softplused": Softplused,
    "compiled": Compiled,
    "core": Core,
    "nrow": Nrow,
    "no_state_axis": lambda: NoStateAxis(states=1),
    "states": lambda: States(states=2),
    "vmamba": Vmamba,
    "inner": lambda: Inner("whole"),
    "no_out_proj": lambda: Inner("no_out_proj"),
    "bimamba": lambda: Inner("bimamba"),
    "module": Module,
    "vim": lambda: Module(bimamba_type="v2", if_divide_out=True),
    "convolutions": Convolutions,
    "norms": Norms,
    "mamba2": lambda: Mamba2(fused=False),
    "mamba2_fused": lambda: Mamba2(fused=True),
    "own_loop": OwnLoop,
}


class Network(nn.Module):
    """A patch embedding, blocks, and a map: (b, 3, H, W) -> {"logits": (b, 10), "maps": [(b, 16, H/8, W/8)]}."""

    def __init__(self, *names, blocks=BLOCKS):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.blocks = nn.ModuleDict({name: blocks[name]() for name in names})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.stem(x)
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks.values():
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return {"logits": self.head(tokens.mean(1)), "maps": [tokens.transpose(1, 2).unflatten(2, x.shape[2:])]}

"""Mamba-2 (state space duality) in standard ops: chunks of steps by matrix products, a short loop over the chunks.

    h_t = exp(dt_t A_h) h_(t-1) + dt_t x_t B_t^T;   y_t = C_t h_t + D x_t         one decay per head and step

Inside a chunk, y_i = sum_(j <= i) (C_i B_j) exp(S_i - S_j) dt_j x_j with S the running sum of dt A. No exponent exceeds
0, so there is no overflow and no division. S_i - S_j is summed for each pair: a difference of running sums loses bits.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evm_deploy.errors import UsageError
from evm_deploy.model.foreign.mamba1 import causal_conv, refuse
from evm_deploy.model.foreign.norms import gated_rms_norm
from evm_deploy.scan.portable import softplus_series

CHUNK = 64
#: How often each function of this module was called in this process: a look at a module counts its scans by it.
calls: Counter[str] = Counter()
NO_LIMIT = (0.0, math.inf)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = CHUNK,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Any = None,
    seq_idx: Any = None,
    cu_seqlens: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    **more: Any,
) -> Any:
    """Stand in for mamba_ssm's `mamba_chunk_scan_combined` -> y (b, L, H, P)[, last states (b, H, P, N)].

    Shapes: x (b, L, H, P); dt (b, L, H); A, dt_bias (H,); B, C (b, L, G, N); D (H,) or (H, P); z as x. chunk_size is
    not read: the result does not depend on it. Raises UsageError for initial states and packed sequences.
    """
    refuse("mamba_chunk_scan_combined", initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens, **more)
    calls["mamba_chunk_scan_combined"] += 1
    batch, length, heads, width = x.shape
    steps = min(CHUNK, length)
    chunks = -(-length // steps)
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        dt = softplus_series(dt)  # the runtimes' own lose small values
    if tuple(dt_limit) != NO_LIMIT:
        dt = dt.clamp(*dt_limit)

    def split(tensor: Tensor) -> Tensor:  # (b, L, H, X) -> (b, H, chunks, steps, X); a padded step has dt = 0
        tensor = F.pad(tensor.float(), (0, 0, 0, 0, 0, chunks * steps - length))
        return tensor.reshape(batch, chunks, steps, -1, tensor.shape[-1]).permute(0, 3, 1, 2, 4)

    def per_head(tensor: Tensor) -> Tensor:  # (b, L, G, N) -> (b, L, H, N); coremltools 9.0 has no repeat_interleave
        return tensor.unsqueeze(3).expand(-1, -1, -1, heads // tensor.shape[2], -1).flatten(2, 3)

    inflow, Bs, Cs = split(x.float() * dt.unsqueeze(-1)), split(per_head(B)), split(per_head(C))
    rate = split((dt * A.float()).unsqueeze(-1))  # (b, H, chunks, steps, 1), <= 0
    every = torch.ones(steps, steps, device=x.device)
    sums = (rate * every.tril(-1)).cumsum(3)  # [i, j]: the sum of the rates of steps j + 1 .. i
    y = (Cs @ Bs.transpose(-1, -2) * torch.exp(sums) * every.tril()) @ inflow
    since_start = rate.cumsum(3)
    until_end = torch.exp(sums[..., -1:, :]).transpose(-1, -2)
    ends = (until_end * Bs).transpose(-1, -2) @ inflow  # (b, H, chunks, N, P)
    over = torch.exp(since_start[..., -1:, :])
    state = ends[:, :, 0] * 0
    starts = []
    for chunk in range(chunks):
        starts.append(state)
        state = over[:, :, chunk] * state + ends[:, :, chunk]
    if chunks > 1:
        y = y + (torch.exp(since_start) * Cs) @ torch.stack(starts, 2)
    y = y.permute(0, 2, 3, 1, 4).reshape(batch, chunks * steps, heads, width)[:, :length]
    if D is not None:
        y = y + D.float().reshape(heads, -1) * x.float()
    if z is not None:
        y = y * F.silu(z.float())
    y = y.to(x.dtype).contiguous()  # callers take views of it
    return (y, state.transpose(-1, -2).contiguous()) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Any = None,
    seq_idx: Any = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Any:
    """Stand in for mamba_ssm's `mamba_split_conv1d_scan_combined`: a Mamba-2 layer after its first projection.

    zxbcdt: (b, L, 2 H P + 2 G N + H). Returns (b, L, H P), or the layer's output (b, L, C) with outproj_weight; with
    return_final_states, also the last states.
    """

    def by(tensor: Tensor, *shape: int) -> Tensor:
        return tensor.reshape(*tensor.shape[:-1], *shape)

    heads = dt_bias.shape[0]
    if headdim is None and D.dim() < 2:
        raise UsageError(
            f"mamba_split_conv1d_scan_combined: headdim is missing, and D of shape {list(D.shape)} does not give it",
            "pass headdim, as mamba_ssm requires for a D of one number a head",
        )
    width = headdim or D.shape[1]
    inner = heads * width
    states = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    unread = zxbcdt.shape[-1] - 2 * inner - 2 * ngroups * states - heads
    refuse("mamba_split_conv1d_scan_combined", channels_without_scan=unread or None)
    z, xBC, dt = torch.split(zxbcdt, [inner, inner + 2 * ngroups * states, heads], -1)
    xBC = causal_conv(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation).transpose(1, 2)
    x, B, C = torch.split(xBC, [inner, ngroups * states, ngroups * states], -1)
    y, last = mamba_chunk_scan_combined(
        by(x, heads, width),
        dt,
        A,
        by(B, ngroups, states),
        by(C, ngroups, states),
        D=D,
        z=by(z, heads, width) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        groups = inner // ngroups
        y = gated_rms_norm(y, rmsnorm_weight, None, z, rmsnorm_eps, groups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, last) if return_final_states else y

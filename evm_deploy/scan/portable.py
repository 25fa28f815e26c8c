"""The portable scan: the selective scan in plain torch ops, loop-free after tracing, differentiable, exact.

Two levels ("sqrt" scan): L is cut into chunks of T steps. Pass 1 runs T steps of all chunks side by side and keeps
the chunks' end states. A carry runs over the chunks. Pass 2 restarts every chunk from its carried state.
There is no division by a cumulated decay, because that form breaks on trained networks (spec, section 6).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus_series(x: Tensor) -> Tensor:
    """Compute log(1 + exp(x)) without a log; relative error 3e-7.

    The formula is max(x, 0) + 2 atanh(s), s = e / (2 + e), e = exp(-|x|). The runtimes' own Softplus and log(1 + exp)
    lose small deltas or are slow.
    """
    e = torch.exp(-x.abs())
    s = e / (e + 2)
    square = s * s
    series: Tensor | float = 2 / 13
    for k in (11, 9, 7, 5, 3, 1):
        series = series * square + 2 / k
    return F.relu(x) + series * s


def chunk_length(L: int) -> int:
    """Return the steps per chunk T that about minimise the number of sequential steps, 2 T + L / T."""
    return max(1, round(math.sqrt(L / 2)))


def two_level_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    bias: Tensor,
    *,
    delta_softplus: bool = True,
) -> Tensor:
    """Compute `reference.selective_scan` in standard ops, with static shapes and no in-place writes.

    The result has the dtype of the inputs.
    """
    batch, K, L, D = u.shape
    T = chunk_length(L)
    chunks = -(-L // T)
    dt = delta + bias[:, None]
    if delta_softplus:
        dt = softplus_series(dt)
    pad = (0, 0, 0, chunks * T - L)  # padded after softplus: a padded step has dt = 0 and keeps the state

    def split(x: Tensor) -> Tensor:  # (b, K, L, X) -> (T, b, K, chunks, X)
        return F.pad(x, pad).reshape(batch, K, chunks, T, x.shape[-1]).permute(3, 0, 1, 2, 4)

    dts = split(dt).unsqueeze(-1)
    decay = torch.exp(dts * A.unsqueeze(1))
    inflow = split(dt * u).unsqueeze(-1) * split(B).unsqueeze(-2)
    end = _run(decay, inflow, torch.zeros_like(inflow[0]))[-1]
    over_chunk = torch.exp(dts.sum(0) * A.unsqueeze(1))
    starts = [torch.zeros_like(end[:, :, 0])]
    for chunk in range(chunks - 1):
        starts.append(over_chunk[:, :, chunk] * starts[-1] + end[:, :, chunk])
    states = torch.stack(_run(decay, inflow, torch.stack(starts, 2)))
    y = torch.matmul(states, split(C).unsqueeze(-1)).squeeze(-1)
    return y.permute(1, 2, 3, 0, 4).reshape(batch, K, chunks * T, D)[:, :, :L] + skip[:, None] * u


def _run(decay: Tensor, inflow: Tensor, h: Tensor) -> list[Tensor]:
    states = []
    for a, x in zip(decay.unbind(0), inflow.unbind(0), strict=True):
        h = a * h + x
        states.append(h)
    return states

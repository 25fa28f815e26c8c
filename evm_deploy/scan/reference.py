"""The float64 loop that every lowering of the selective scan is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def softplus(x: Array) -> Array:
    """log(1 + exp(x)) without overflow and without losing small values; dtype of x."""
    result: Array = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return result


def selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, skip: Array, bias: Array
) -> NDArray[np.float64]:
    """The Mamba-1 selective scan in float64, one step at a time.

    Shapes, channels last: u, delta (b, K, L, D); A (K, D, N), negative; B, C (b, K, L, N); skip, bias (K, D).
    `delta` is taken before softplus. Returns y like u, float64. Cost O(b K L D N): for checks, not for use.
    Why a loop: cumsum-and-divide breaks once exp(sum(dt * A)) underflows, which trained networks reach.

        dt = softplus(delta + bias);  h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = <C_t, h_t> + skip u_t
    """
    u, delta, A, B, C, skip, bias = (np.asarray(x, np.float64) for x in (u, delta, A, B, C, skip, bias))
    dt = softplus(delta + bias[:, None])
    inflow = dt * u
    h = np.zeros((u.shape[0], *A.shape))
    y = np.empty(u.shape)
    for t in range(u.shape[2]):
        h = np.exp(dt[:, :, t, :, None] * A) * h + inflow[:, :, t, :, None] * B[:, :, t, None, :]
        y[:, :, t] = (h @ C[:, :, t, :, None])[..., 0]
    return y + skip[:, None] * u

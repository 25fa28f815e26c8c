"""The float64 reference of the selective scan, and the error of a lowering against it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
SCAN_TOLERANCE = 2e-5  # error of the SSM part, float32 against the float64 loop: ten times that of correct lowerings
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # relative rounding error of y, before skip * u is subtracted
LARGEST_DT = 20.0
#: The seven tensors of a scan by name, and `delta_softplus`, a bool array of rank 0, where it is False.
Scan = dict[str, NDArray[Any]]


def softplus(x: Array) -> Array:
    """Compute log(1 + exp(x)) without overflow and without loss of small values, in the dtype of x."""
    result: Array = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return result


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    skip: Array,
    bias: Array,
    delta_softplus: bool | NDArray[np.bool_] = True,
) -> NDArray[np.float64]:
    """Compute the Mamba-1 selective scan in float64, one step at a time.

    Shapes, channels last: u, delta (b, K, L, D); A (K, D, N), negative; B, C (b, K, L, N); skip, bias (K, D).
    `delta` is the value before softplus; with delta_softplus=False, dt = delta + bias. Returns y with the shape of u,
    in float64. The cost is O(b K L D N): for checks only. The scan is a loop because cumsum-and-divide breaks once
    exp(sum(dt * A)) underflows, which trained networks reach.

        dt = softplus(delta + bias);  h_t = exp(dt_t A) h_(t-1) + dt_t u_t B_t;  y_t = <C_t, h_t> + skip u_t
    """
    u, delta, A, B, C, skip, bias = (np.asarray(x, np.float64) for x in (u, delta, A, B, C, skip, bias))
    dt: Array = delta + bias[:, None]
    if delta_softplus:
        dt = softplus(dt)
    inflow = dt * u
    h = np.zeros((u.shape[0], *A.shape))
    y = np.empty(u.shape)
    for t in range(u.shape[2]):
        h = np.exp(dt[:, :, t, :, None] * A) * h + inflow[:, :, t, :, None] * B[:, :, t, None, :]
        y[:, :, t] = (h @ C[:, :, t, :, None])[..., 0]
    return y + skip[:, None] * u


def inverse_softplus(dt: Array) -> Array:
    """Compute log(exp(dt) - 1) of positive values, without overflow and without loss of small values."""
    result: Array = dt + np.log(-np.expm1(-dt))
    return result


def with_softplus(scan: Scan) -> Scan:
    """Return the scan with delta before softplus, at the same dt. dt of zero or less becomes the smallest float32."""
    scan = dict(scan)
    if scan.pop("delta_softplus", True):
        return scan
    bias = scan["bias"].astype(np.float64)[:, None]
    dt = np.maximum(scan["delta"] + bias, np.finfo(np.float32).tiny)
    return {**scan, "delta": (inverse_softplus(dt) - bias).astype(np.float32)}


def large_delta_case(scan: Scan, rng: np.random.Generator) -> Scan:
    """Return scan inputs shaped as `scan`: random u, B and C, and dt log-uniform in 0.1..20."""
    dt = np.exp(rng.uniform(np.log(0.1), np.log(LARGEST_DT), scan["delta"].shape))
    delta = (inverse_softplus(dt) if scan.get("delta_softplus", True) else dt) - scan["bias"][:, None]
    random = {key: rng.standard_normal(scan[key].shape).astype(np.float32) for key in ("u", "B", "C")}
    return {**scan, **random, "delta": delta.astype(np.float32)}


def ssm_error(y: NDArray[Any], inputs: Scan) -> tuple[float, float]:
    """Compare the SSM part of y, y - skip * u, with the float64 loop -> (error, limit).

    Both are relative to the largest value of the SSM part. The error is inf if y has another shape, NaN or Inf. The
    limit includes the rounding of y in float32, which dominates where skip * u is much larger than the SSM part.
    """
    want = selective_scan(**inputs)
    skip_part = inputs["skip"].astype(np.float64)[:, None] * inputs["u"]
    largest = max(float(np.abs(want - skip_part).max()), float(np.finfo(np.float32).tiny))
    limit = SCAN_TOLERANCE + ROUNDING * float(np.abs(skip_part).max()) / largest
    if y.shape != want.shape or not np.isfinite(y).all():
        return float("inf"), limit
    return float(np.abs(y - want).max()) / largest, limit

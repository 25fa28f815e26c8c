"""Adaptor from channels-first Mamba-1 calls to the op evm::selective_scan.

Shapes of a call: u, delta (b, G Dg, L); A (G Dg, N), negative; B, C (b, G, N, L) or (b, N, L); D, bias (G Dg,). G is
the number of groups of B and C, and becomes the directions K of the op.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from evm_deploy.errors import UsageError
from evm_deploy.scan.op import selective_scan


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    op: Callable[..., Tensor] = selective_scan,
) -> Tensor:
    """Compute the selective scan of a channels-first call, in float32, gated by silu(z) if z is given.

    Returns (b, G Dg, L), contiguous, in the dtype of u. Raises UsageError for a complex A, and for a B or C that does
    not depend on the input.
    """
    if A.is_complex():
        raise UsageError("selective scan: A is complex", "the op has real states only: use the network's real form")
    batch, channels, length = u.shape
    B, C = _grouped(B, "B"), _grouped(C, "C")
    groups = max(B.shape[1], C.shape[1])

    def last(x: Tensor) -> Tensor:  # (b, G X, L) -> (b, G, L, X)
        return x.float().reshape(batch, groups, -1, length).transpose(2, 3)

    def constant(x: Tensor | None) -> Tensor:  # (G Dg,) -> (G, Dg)
        x = A.new_zeros(channels) if x is None else x
        return x.float().reshape(groups, -1)

    y: Tensor = op(
        last(u),
        last(delta),
        A.float().reshape(groups, -1, A.shape[-1]),
        last(B.expand(-1, groups, -1, -1)),
        last(C.expand(-1, groups, -1, -1)),
        constant(D),
        constant(delta_bias),
        **({} if delta_softplus else {"delta_softplus": False}),
    )
    y = y.transpose(2, 3).reshape(batch, channels, length).to(u.dtype)
    y = y if z is None else y * F.silu(z)
    return y.contiguous()  # callers take views of it


def scan_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Compute the states of a channels-first scan -> (b, G Dg, N, L): one scan in which every state is a group."""
    B = _grouped(B, "B")
    (batch, groups, states, length), channels = B.shape, u.shape[1]

    def repeated(x: Tensor) -> Tensor:  # (.., G Dg, X) -> (.., G N Dg, X)
        parts = x.reshape(*x.shape[:-2], groups, 1, channels // groups, x.shape[-1])
        return parts.expand(*x.shape[:-2], groups, states, -1, -1).reshape(*x.shape[:-2], -1, x.shape[-1])

    A = A.reshape(groups, -1, states).transpose(1, 2).reshape(-1, 1)
    bias = None if delta_bias is None else repeated(delta_bias[:, None])[:, 0]
    B = B.reshape(batch, groups * states, 1, length)
    ones = B * 0 + 1  # computed: an artifact's scans are verified on a C of the test's own
    y = scan(repeated(u), repeated(delta), A, B, ones, None, None, bias, delta_softplus)
    y = y.reshape(batch, groups, states, -1, length).transpose(2, 3)
    return y.reshape(batch, channels, states, length)


def _grouped(x: Tensor, name: str) -> Tensor:
    """Return B or C as (b, G, N, L)."""
    if x.dim() < 3:
        raise UsageError(f"selective scan: {name} of shape {list(x.shape)} does not depend on the input")
    return x.unsqueeze(1) if x.dim() == 3 else x

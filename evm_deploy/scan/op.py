"""The torch custom op `evm::selective_scan`: eager on the CPU, opaque to torch.export, differentiable.

Importing this module registers the op. Contract and symbols: `evm_deploy.scan.reference.selective_scan`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evm_deploy.scan.native import native_kernel, run_native_scan
from evm_deploy.scan.portable import two_level_scan

#: Elements of one block of states: 1 MB of float32, so that a block stays in a core's L2 cache.
BLOCK_ELEMENTS = 1 << 18


@torch.library.custom_op("evm::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    bias: Tensor,
    delta_softplus: bool = True,
) -> Tensor:
    """Compute `reference.selective_scan` on torch tensors, in float32 or float64.

    float32 tensors on the CPU run on the native kernel if the library is installed; other tensors run in torch. Raises
    ValueError if the shapes do not fit each other.
    """
    inputs = (u, delta, A, B, C, skip, bias)
    _check_shapes(*inputs)
    kernel = native_kernel(inputs)
    return run_native_scan(kernel, inputs, delta_softplus) if kernel else _scan_in_torch(*inputs, delta_softplus)


def _scan_in_torch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, bias: Tensor, delta_softplus: bool
) -> Tensor:
    """Compute the scan block by block along L.

    The decays and inflows of a block are computed at once. The recurrence is one fused multiply-add per step into the
    block's buffer. The outputs are one product per block.
    """
    batch, K, L, D = u.shape
    dt = delta + bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    inflow = dt * u
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    h = torch.zeros((batch, K, D, A.shape[-1]), dtype=u.dtype, device=u.device)
    block = max(1, BLOCK_ELEMENTS // max(1, h.numel()))
    time_first = (2, 0, 1, 3)
    for start in range(0, L, block):
        steps = slice(start, start + block)
        decay = torch.exp(dt[:, :, steps].permute(time_first).unsqueeze(-1) * A)
        states = inflow[:, :, steps].permute(time_first).unsqueeze(-1) * B[:, :, steps].permute(time_first).unsqueeze(
            -2
        )
        for t in range(states.shape[0]):
            h = torch.addcmul(states[t], decay[t], h, out=states[t])
        outputs = torch.matmul(states, C[:, :, steps].permute(time_first).unsqueeze(-1)).squeeze(-1)
        y[:, :, steps] = outputs.permute(1, 2, 0, 3)
    return torch.addcmul(y, skip[:, None], u)


@selective_scan.register_fake
def _(u: Tensor, *_: Tensor | bool) -> Tensor:
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients with the portable scan, which autograd can differentiate."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        return *torch.autograd.grad(two_level_scan(*inputs, delta_softplus=ctx.delta_softplus), inputs, grad), None


selective_scan.register_autograd(_backward, setup_context=_save_inputs)


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, bias: Tensor) -> None:
    if u.dim() != 4 or A.dim() != 3:
        raise ValueError(
            f"selective_scan: u must be (b, K, L, D) and A (K, D, N), got {list(u.shape)}, {list(A.shape)}"
        )
    (batch, K, L, D), N = u.shape, A.shape[-1]
    expected = {
        "delta": (delta, (batch, K, L, D)),
        "A": (A, (K, D, N)),
        "B": (B, (batch, K, L, N)),
        "C": (C, (batch, K, L, N)),
        "skip": (skip, (K, D)),
        "bias": (bias, (K, D)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} has shape {list(tensor.shape)}, u and A require {list(shape)}")

"""Stand-ins for the Triton norms of mamba_ssm, in standard ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.model.foreign.mamba1 import refuse


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    **more: Any,
) -> Any:
    """Stand in for mamba_ssm's `layer_norm_fn`: norm of x + residual; with prenorm, (norm, x + residual).

    Raises UsageError for parallel norms, row scales and dropout.
    """
    refuse("layer_norm_fn", x1=x1, weight1=weight1, bias1=bias1, rowscale=rowscale, dropout_p=dropout_p or None, **more)
    total = x.float() if residual is None else x.float() + residual.float()
    scale = weight.float() + 1 if zero_centered_weight else weight.float()
    shift = None if bias is None else bias.float()
    if is_rms_norm:
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * scale
        y = y if shift is None else y + shift
    else:
        y = F.layer_norm(total, (total.shape[-1],), scale, shift, eps)
    y = y.to(x.dtype)
    if not prenorm:
        return y
    keeps = residual_in_fp32 or (residual is not None and residual.dtype == torch.float32)
    return y, total if keeps else total.to(x.dtype)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, **named: Any) -> Any:
    """Stand in for mamba_ssm's `rms_norm_fn`, as `layer_norm_fn`."""
    return layer_norm_fn(x, weight, bias, *arguments, **{**named, "is_rms_norm": True})


class RMSNorm(nn.Module):
    """Stand-in for `RMSNorm` of mamba_ssm's layer_norm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_weight = eps, zero_centered_weight
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """Compute the norm of x + residual; with prenorm, (norm, x + residual)."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Stand in for `rmsnorm_fn` of mamba_ssm's layernorm_gated: norm in groups of channels, gated by silu(z)."""
    gate = None if z is None else F.silu(z.float())
    y = x.float()
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.reshape(*y.shape[:-1], -1, group_size or y.shape[-1])
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    y = y if bias is None else y + bias.float()
    y = y * gate if gate is not None and norm_before_gate else y
    result: Tensor = y.to(x.dtype)
    return result


class GatedRMSNorm(nn.Module):
    """Stand-in for `RMSNorm` of mamba_ssm's layernorm_gated."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Compute the norm of x, gated by silu(z)."""
        return gated_rms_norm(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)

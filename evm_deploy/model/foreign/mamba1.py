"""Stand-ins for the entry points of Mamba-1: scans, the fused inner functions, the short convolution, `Mamba`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evm_deploy.errors import UsageError
from evm_deploy.model.foreign.scan import scan, scan_states

ACTIVATIONS = (None, "silu", "swish")
BIMAMBA_TYPES = (None, "none", "v1", "v2")
REGISTER = "register a function for it: evm_deploy.model.foreign.register"


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """Stand in for mamba_ssm's `selective_scan_fn`. Raises UsageError for return_last_state."""
    refuse("selective_scan_fn", return_last_state=return_last_state)
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def mamba_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *_: Any,
) -> tuple[Tensor, ...]:
    """Stand in for `selective_scan_cuda.fwd` -> (y, states for backward[, gated y])."""
    y = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return (y, _unusable(u, A), *(() if z is None else (y * F.silu(z),)))


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """Stand in for `selective_scan_cuda_{core,oflex,nrow,ndstate}.fwd` -> (y, states for backward)."""
    if A.dim() == 1:  # ndstate has no axis of states: A (D,), B and C (b, G, L)
        A, B, C = A[:, None], B.unsqueeze(2), C.unsqueeze(2)
    return scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus), _unusable(u, A)


def states_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """Stand in for `selective_scan_cuda_oflex_rh.fwd` -> (states (b, D, N, L), states for backward). D is not read."""
    return scan_states(u, delta, A, B, delta_bias, delta_softplus), _unusable(u, A)


def _unusable(u: Tensor, A: Tensor) -> Tensor:
    """Return NaN in the shape of the states that the kernels keep for the backward pass, so that a reader shows."""
    return u.new_full((u.shape[0], u.shape[1], 1, 2 * A.shape[1]), math.nan)


def refuse(name: str, **features: Any) -> None:
    """Raise UsageError for the first feature that is neither None nor False."""
    for feature, value in features.items():
        if value is not None and value is not False:
            raise UsageError(f"{name}: {feature} has no stand-in", REGISTER)


def require_one_of(name: str, argument: str, value: Any, known: Sequence[Any]) -> None:
    """Raise UsageError if an argument has a value that its stand-in does not know."""
    if value not in known:
        raise UsageError(f"{name}: {argument}={value!r} has no stand-in, only {', '.join(map(repr, known))}", REGISTER)


# ---------------------------------------------------------------------------------------------- the short convolution


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Convolve each channel of x (b, D, L) with its own causal filter, weight (D, width) -> (b, D, L).

    Raises UsageError for an activation that is not in ACTIVATIONS.
    """
    require_one_of("causal_conv1d", "activation", activation, ACTIVATIONS)
    weight = weight.reshape(weight.shape[0], 1, -1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, bias, groups=x.shape[1])
    return y if activation is None else F.silu(y)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Any = None,
    initial_states: Any = None,
    return_final_states: bool = False,
    final_states_out: Any = None,
    activation: str | None = None,
) -> Tensor:
    """Stand in for causal_conv1d's `causal_conv1d_fn`. Raises UsageError for states and sequence indices."""
    refuse(
        "causal_conv1d_fn",
        seq_idx=seq_idx,
        initial_states=initial_states,
        return_final_states=return_final_states,
        final_states_out=final_states_out,
    )
    return causal_conv(x, weight, bias, activation)


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor | None:
    """Stand in for `causal_conv1d_cuda.causal_conv1d_fwd` of every release: the last argument is the flag of silu.

    Releases from 1.5 on pass eight arguments, write the result into the sixth, and return nothing.
    """
    *states, silu = rest
    out = states.pop(2) if len(states) == 4 else None
    refuse("causal_conv1d_fwd", states=next((state for state in states if state is not None), None))
    y = causal_conv(x, weight, bias, "silu" if silu else None)
    if out is None:
        return y
    out.copy_(y)
    return None


# --------------------------------------------------------------------------------------------------- inner functions


def _inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    A_b: Tensor | None = None,
) -> Tensor:
    """Compute everything of a Mamba layer between its two projections; with A_b, a second scan from the end."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv(x, conv_weight, conv_bias, "silu")
    rank, states = dt_proj.shape[1], A.shape[1]
    projected = F.linear(x.transpose(1, 2), x_proj)
    delta = F.linear(projected[..., :rank], dt_proj).transpose(1, 2)
    if B is None:
        B = projected[..., rank : rank + states].transpose(1, 2)
    if C is None:
        C = projected[..., -states:].transpose(1, 2)
    y = scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if A_b is None:
        return y
    x, delta, B, C, z = (tensor.flip([-1]) for tensor in (x, delta, B, C, z))
    return y + scan(x, delta, A_b, B, C, D, z, delta_bias, delta_softplus).flip([-1])


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Stand in for mamba_ssm's `mamba_inner_fn_no_out_proj`: xz (b, 2 D, L) -> (b, D, L)."""
    refuse("mamba_inner_fn_no_out_proj", B_proj_bias=B_proj_bias, C_proj_bias=C_proj_bias)
    return _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, delta_softplus
    )


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Stand in for mamba_ssm's `mamba_inner_fn`: xz (b, 2 D, L) -> (b, L, C). checkpoint_lvl is of the training."""
    refuse(
        "mamba_inner_fn",
        B_proj_bias=B_proj_bias,
        C_proj_bias=C_proj_bias,
        b_rms_weight=b_rms_weight,
        c_rms_weight=c_rms_weight,
        dt_rms_weight=dt_rms_weight,
    )
    y = _inner(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Stand in for Vim's `bimamba_inner_fn`: one scan from each end, with the same projections."""
    refuse("bimamba_inner_fn", B_proj_bias=B_proj_bias, C_proj_bias=C_proj_bias)
    y = _inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, delta_softplus, A_b
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


class Mamba(nn.Module):
    """Stand-in for mamba_ssm's `Mamba`, for users who have no mamba_ssm: (b, L, C) -> (b, L, C).

    Parameters have the names of the original, the bidirectional variants of Vim's copy included. Arguments that decide
    only initial values are accepted, and not used: the weights are loaded. Raises UsageError for a bimamba_type that is
    not in BIMAMBA_TYPES.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
    ) -> None:
        require_one_of("Mamba", "bimamba_type", bimamba_type, BIMAMBA_TYPES)
        super().__init__()
        inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.bimamba_type, self.halve = bimamba_type, if_divide_out
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        for suffix in ("", "_b") if bimamba_type == "v2" else ("",):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        A_log = torch.log(torch.arange(1, d_state + 1.0)).repeat(inner, 1)
        self.A_log = nn.Parameter(A_log)
        if bimamba_type in ("v1", "v2"):
            self.A_b_log = nn.Parameter(A_log.clone())
        self.gamma = None if init_layer_scale is None else nn.Parameter(init_layer_scale * torch.ones(d_model))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Compute the layer. Raises UsageError for inference_params, the states of token by token generation."""
        refuse("Mamba", inference_params=inference_params)
        xz = self.in_proj(hidden_states).transpose(1, 2)
        A = -torch.exp(self.A_log.float())
        y: Tensor
        if self.bimamba_type == "v2":
            backward = self._branch(xz.flip([-1]), -torch.exp(self.A_b_log.float()), "_b").flip([-1])
            y = self._branch(xz, A, "") + backward
            y = y / 2 if self.halve else y
        else:
            A_b = -torch.exp(self.A_b_log.float()) if self.bimamba_type == "v1" else None
            y = self._branch(xz, A, "", A_b)
        y = self.out_proj(y.transpose(1, 2))
        return y if self.gamma is None else y * self.gamma

    def _branch(self, xz: Tensor, A: Tensor, suffix: str, A_b: Tensor | None = None) -> Tensor:
        conv, x_proj, dt_proj = (self.get_submodule(f"{name}{suffix}") for name in ("conv1d", "x_proj", "dt_proj"))
        D = self.get_parameter(f"D{suffix}").float()
        projections: tuple[Tensor, ...] = (x_proj.weight, dt_proj.weight, dt_proj.bias)  # type: ignore[assignment]
        x_weight, dt_weight, bias = projections
        filters: tuple[Tensor, Tensor] = (conv.weight, conv.bias)  # type: ignore[assignment]
        return _inner(xz, *filters, x_weight, dt_weight, A, None, None, D, bias.float(), True, A_b)

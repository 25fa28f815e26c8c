"""The table of stand-ins: dotted module name -> attribute -> our function, class or value.

`FIRST` and `TRITON` are served before anything installed: compiled extensions, and Triton-backed modules below any
parent package. `LAST` is served only where the user has no such package. Every module may also be asked for other
names: they are placeholders, which can be imported and raise with their own name when they are called.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F

from evm_deploy.errors import UsageError
from evm_deploy.model.foreign import mamba1, norms, orders, ssd

Names = dict[str, Any]

_CORE: Names = {"fwd": mamba1.core_fwd}
_VMAMBA: Names = {"selective_scan_cuda_core": SimpleNamespace(**_CORE)}
_CONVOLUTION: Names = {"causal_conv1d_fn": mamba1.causal_conv1d_fn}
_INTERFACE: Names = {
    "selective_scan_fn": mamba1.selective_scan_fn,
    "mamba_inner_fn": mamba1.mamba_inner_fn,
    "mamba_inner_fn_no_out_proj": mamba1.mamba_inner_fn_no_out_proj,
    "bimamba_inner_fn": mamba1.bimamba_inner_fn,
}
_NORMS: Names = {
    "RMSNorm": norms.RMSNorm,
    "layer_norm_fn": norms.layer_norm_fn,
    "rms_norm_fn": norms.rms_norm_fn,
}


def _depthwise(x: Any, weight: Any, *padding: int) -> Any:
    """Stand in for Spatial-Mamba's `dwconv2d_fp32`."""
    return F.conv2d(x, weight, padding=padding, groups=x.shape[1])


FIRST: dict[str, Names] = {
    "selective_scan_cuda": {"fwd": mamba1.mamba_fwd},
    "selective_scan_cuda_core": _CORE,
    "selective_scan_cuda_oflex": _CORE,
    "selective_scan_cuda_nrow": _CORE,
    "selective_scan_cuda_ndstate": _CORE,
    "selective_scan_cuda_oflex_rh": {"fwd": mamba1.states_fwd},
    "selective_scan_vmamba": _VMAMBA,
    "selective_scan_vmamba_pt202": _VMAMBA,
    "causal_conv1d_cuda": {"causal_conv1d_fwd": mamba1.causal_conv1d_fwd},
    "dwconv2d": {"dwconv2d_fp32": _depthwise},
    # parts of mamba_ssm that need a particular transformers, and that vision models import by accident
    "mamba_ssm.models.mixer_seq_simple": {},
    "mamba_ssm.utils.generation": {},
    "mamba_ssm.utils.hf": {},
    "mamba_ssm.modules.mamba3": {},
}
#: Last part of a module's name below `<any parent>.ops.triton`.
TRITON: dict[str, Names] = {
    "layer_norm": _NORMS,
    "layernorm": _NORMS,
    "layernorm_gated": {"RMSNorm": norms.GatedRMSNorm, "rmsnorm_fn": norms.gated_rms_norm},
    "ssd_combined": {
        "mamba_chunk_scan_combined": ssd.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": ssd.mamba_split_conv1d_scan_combined,
    },
    "selective_state_update": {},
    "ssd_chunk_state": {},
    "k_activations": {},
}
LAST: dict[str, Names] = {
    "mamba_ssm": {"Mamba": mamba1.Mamba, **_INTERFACE},
    "mamba_ssm.models": {},
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": mamba1.Mamba},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.selective_scan_interface": _INTERFACE,
    "mamba_ssm.utils": {},
    "selective_scan": _INTERFACE,
    "causal_conv1d": _CONVOLUTION,
    "causal_conv1d.causal_conv1d_interface": _CONVOLUTION,
    "causal_conv1d.causal_conv1d_varlen": {},
    "causal_conv1d.cpp_functions": {"causal_conv1d_fwd_function": mamba1.causal_conv1d_fwd},
    "triton": {
        "__version__": "3.5.0",
        "cdiv": lambda x, y: -(-x // y),
        "next_power_of_2": lambda n: 1 << (int(n) - 1).bit_length(),
    },
}
#: Classes of autograd functions that launch a Triton kernel, by name. The values take the arguments of `apply`, by the
#: names that the class's own forward gives them.
AUTOGRAD: Names = {
    "LocalScanTriton": orders.local_scan,
    "LocalReverseTriton": orders.local_reverse,
    "MambaChunkScanCombinedFn": ssd.mamba_chunk_scan_combined,
}


def register(name: str, stand_in: Any) -> None:
    """Serve `stand_in` in the place of a name that code for CUDA imports, in this process.

    name: `package.module.name` for a name of a module, or the bare name of a torch.autograd.Function class, whose
    `apply` then calls `stand_in` with the arguments by the names of the class's own forward. Call this before the
    import. Raises UsageError for a name that is neither.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(
            f"{name!r} is no name to register", "use package.module.name, or the name of an autograd function's class"
        )
    module, _, leaf = name.rpartition(".")
    if not module:
        AUTOGRAD[leaf] = stand_in
        return
    known = LAST if module in LAST else FIRST
    known[module] = {**known.get(module, {}), leaf: stand_in}


def served_first(module: str) -> Names | None:
    """Return the names of a module that is served before anything installed, or None."""
    head, _, leaf = module.rpartition(".")
    if module not in FIRST and head.endswith("ops.triton"):
        return TRITON.get(leaf)
    return FIRST.get(module)


def served_last(module: str) -> Names | None:
    """Return the names of a module that is served where nothing is installed, or None."""
    return {} if module.startswith("triton.") else LAST.get(module)

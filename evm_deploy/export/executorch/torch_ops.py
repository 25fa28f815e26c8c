"""Operators of domain evm as custom ops of torch that ExecuTorch can lower: each with the form that writes to `out`.

ExecuTorch plans the memory of outputs, and so calls the form `out` of an operator (native/executorch/ops.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evm_deploy.scan import op  # noqa: F401  registers evm::selective_scan
from evm_deploy.scan.onnx_function import INPUTS


@cache
def library() -> Any:
    """Return the fragment of torch's namespace evm that holds our definitions: it lasts as long as the process."""
    return torch.library.Library("evm", "FRAGMENT")  # type: ignore[no-untyped-call]


@cache
def define_out_of_scan() -> None:
    """Define evm::selective_scan.out, once per process."""
    tensors = ", ".join(f"Tensor {name}" for name in INPUTS)
    schema = f"selective_scan.out({tensors}, bool delta_softplus=True, *, Tensor(a!) out) -> Tensor(a!)"
    library().define(schema)
    library().impl("selective_scan.out", _returns_out, "CompositeExplicitAutograd")


@cache
def fused_op(op_type: str) -> Callable[..., Any]:
    """Return the custom op evm::`op_type`(x, operands) -> out, defined at the first call.

    The op has shapes alone: torch does not compute it.
    """
    library().define(f"{op_type}(Tensor x, Tensor[] operands) -> Tensor")
    library().define(f"{op_type}.out(Tensor x, Tensor[] operands, *, Tensor(a!) out) -> Tensor(a!)")
    library().impl(op_type, lambda x, operands: torch.empty_like(x), "CompositeExplicitAutograd")
    library().impl(f"{op_type}.out", _returns_out, "CompositeExplicitAutograd")
    found: Callable[..., Any] = getattr(torch.ops.evm, op_type).default
    return found


def _returns_out(*inputs: Any, out: Tensor) -> Tensor:
    """Return the output as it is: the form `out` is for memory planning alone, torch never runs it."""
    return out

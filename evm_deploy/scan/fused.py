"""Modules that the native library also has as one fused op: how the model tells the exporter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

#: What a fused op may give beside its output, for verification: what its scan read and wrote.
SCAN_OUTPUTS = ("u", "delta", "B", "C", "y")
#: The fused ops that the native library has, as profilers of runtimes name their nodes (native/scan/evm_block.h).
OP_TYPES = ("EVSSBlock", "EVSSBlockInt8")
#: Kinds of work of the stages of one, in the order in which the library counts their ticks. Norms and activations are
#: in the products and convolutions around them.
STAGES = ("layout", "projections", "convolutions", "projections", "scan", "projections", "projections", "activations")


@dataclass(frozen=True)
class FusedOp:
    """evm::`op_type`(x, *operands) -> out, and optionally `SCAN_OUTPUTS`.

    operands: by name, in the op's order and layout. scan: path of the scan inside the module. scan_constants: which
    operands are the scan's A (K, D, N), skip and bias (K, D). int8_layers: operand -> path of the linear layer inside
    the module whose weight it is; where these are int8, the op is evm::`op_type`Int8, and each of the operands is
    followed by <name>_scale, <name>_input_scale and <name>_input_zero_point. constants: operand -> its constant in a
    graph, where there is one (export/hub/fuse.py, match_constants).
    """

    op_type: str
    operands: Mapping[str, Tensor]
    scan: str
    scan_constants: Mapping[str, str]
    int8_layers: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Fusable(Protocol):
    """A module with one tensor in, one out, whose computation is a fused op of the native library."""

    def fused_op(self) -> FusedOp: ...


def fusable_modules(model: nn.Module) -> Iterator[tuple[str, FusedOp]]:
    """(module path, op) of every module of `model` that the native library has as one op."""
    for path, module in model.named_modules():
        if isinstance(module, Fusable):
            yield path, module.fused_op()

"""Fused ops: the interface by which a module tells the exporter that the native library has it as one op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Optional further outputs of a fused op, for verification: the inputs and the output of the op's scan.
SCAN_OUTPUTS = ("u", "delta", "B", "C", "y")
#: Fused ops of the native library (native/scan/evm_block.h), by the type that the runtimes' profilers print.
OP_TYPES = ("EVSSBlock", "EVSSBlockInt8", "EVSSBlockInt8XProj")
#: Kind of work of each stage of a fused op, in the order in which the library counts ticks. The time of norms and
#: activations is counted with the products and convolutions around them.
STAGES = ("layout", "projections", "convolutions", "projections", "scan", "projections", "projections", "activations")


@dataclass(frozen=True)
class FusedOp:
    """The op evm::`op_type`(x, *operands) -> out, with `SCAN_OUTPUTS` as optional further outputs.

    operands: tensors by name, in the op's order and layout. scan: path of the scan inside the module. scan_constants:
    names of the operands that are the scan's A (K, D, N), skip and bias (K, D). int8_layers: operand -> path, inside
    the module, of the linear layer whose weight the operand is and which may become int8. int8_scan_inputs: operands
    that are weights of products before the scan's delta, B and C; they may become int8 where the module is one op.
    int8_types: operands that are int8 -> type of the op with these operands in int8. Each of them is followed by
    <name>_scale, <name>_input_scale and <name>_input_zero_point. constants: operand -> name of its constant in a graph,
    where the graph has one (match_constants in export/hub/fuse.py).
    """

    op_type: str
    operands: Mapping[str, Tensor]
    scan: str
    scan_constants: Mapping[str, str]
    int8_layers: Mapping[str, str] = field(default_factory=dict)
    int8_scan_inputs: frozenset[str] = frozenset()
    int8_types: Mapping[frozenset[str], str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Fusable(Protocol):
    """A module with one input and one output tensor that the native library computes as one fused op."""

    def fused_op(self) -> FusedOp:
        """Return the op that computes the module, with its operands."""
        ...


def fusable_modules(model: nn.Module) -> Iterator[tuple[str, FusedOp]]:
    """Yield (module path, op) of every module of `model` that the native library has as one op."""
    for path, module in model.named_modules():
        if isinstance(module, Fusable):
            yield path, module.fused_op()

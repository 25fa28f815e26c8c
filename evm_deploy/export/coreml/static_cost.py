"""Static cost of a Core ML program, counted without a device. The cost ranks layouts and is not a latency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from evm_deploy.scan.mil import LANES, PREFIX

if TYPE_CHECKING:
    from evm_deploy.runtimes.mil import Program
    from evm_deploy.runtimes.mil.program import Declared, Operation

NO_TRAFFIC = ("reshape", "expand_dims", "squeeze", "identity")
BYTES = {"fp32": 4, "int32": 4, "fp16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}


def static_cost(program: Program) -> dict[str, Any]:
    """Count the static cost of a program.

    Returns operations and scan_operations: numbers of operations. traffic_mb: MB of activations that the operations
    read and write. padded_traffic_mb: the same with the last axis padded to 64 bytes, as the Neural Engine stores
    tensors; a size that depends on values counts as 1. width1_tensors: number of results whose last axis is 1, which
    the padding makes 32 times as large. largest_rank: of all results.
    """
    traffic = padded = 0.0
    results = [result for op in program.operations for result in op.results if result.shape is not None]
    shapes = {result.name: result for result in (*results, *program.inputs.values())}
    for op in program.operations:
        if op.type not in NO_TRAFFIC:
            for declared in (*_reads(op, shapes), *op.results):
                traffic += _size(declared, padded=False)
                padded += _size(declared, padded=True)
    return {
        "operations": len(program.operations),
        "scan_operations": sum(op.results[0].name.startswith(PREFIX) for op in program.operations),
        "traffic_mb": round(traffic / 1e6, 1),
        "padded_traffic_mb": round(padded / 1e6, 1),
        "width1_tensors": sum(len(result.shape or ()) > 1 and (result.shape or ())[-1] == 1 for result in results),
        "largest_rank": max(len(result.shape or ()) for result in results),
    }


def _reads(op: Operation, shapes: dict[str, Declared]) -> list[Declared]:
    return [shapes[name] for name in op.reads if name in shapes]


def _size(declared: Declared, padded: bool) -> float:
    shape = tuple(1 if size is None else size for size in declared.shape or ())
    if padded and shape:
        lanes = LANES * 2 // BYTES[declared.dtype]
        shape = (*shape[:-1], -(-shape[-1] // lanes) * lanes)
    return math.prod(shape) * BYTES.get(declared.dtype, 0)

"""Kernels of a TensorRT-RTX engine, read from its builder's log: `layers.txt` in a bundle.

Bytes are the sum of what kernels read and write: a static cost, not a measurement of time. The format of the log has no
version. A log of another release may have another format, and then no kernels are found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "UInt8": 1, "Bool": 1, "Int32": 4, "Int64": 8}
NO_WORK = ("signal", "wait")
TENSOR = re.compile(r"Name: (\S+), Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")
KERNEL = re.compile(
    r"Name: \S+, LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], Tactic(.*)"
)
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class Tensor:
    """An operand of a kernel. dtype: in the spelling of the log, such as Float, Half, Int8."""

    name: str
    elements: int
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.elements * BYTES[self.dtype]


@dataclass(frozen=True)
class KernelTime:
    """A kernel launch of the engine.

    kind: correlation, gemm, kgen (generated) and others. nodes: names of the ONNX nodes that the launch computes.
    """

    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    @property
    def traffic_bytes(self) -> int:
        """Bytes that the launch reads and writes."""
        return sum(tensor.size_bytes for tensor in (*self.inputs, *self.constants, *self.outputs))


def read_kernels(text: str) -> list[KernelTime]:
    """Read the kernels from a layer log, in order. Returns an empty list for an unknown format."""
    found = (KERNEL.match(line) for line in text.splitlines())
    return [
        KernelTime(match[1], _tensors(match[2]), _tensors(match[3]), _tensors(match[4]), tuple(NODE.findall(match[5])))
        for match in found
        if match and match[1] not in NO_WORK
    ]


def traffic_bytes(kernels: Iterable[KernelTime]) -> int:
    """Return the bytes that all kernels together read and write."""
    return sum(kernel.traffic_bytes for kernel in kernels)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, math.prod(int(size) for size in sizes.split(",") if size), dtype)
        for name, sizes, dtype in TENSOR.findall(text)
    )

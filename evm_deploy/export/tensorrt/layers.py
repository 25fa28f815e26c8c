"""What TensorRT-RTX says that an engine consists of: `layers.txt` in a bundle, the kernels of its builder's log.

Bytes are what kernels read and write, added up: a static cost, no measurement of time. The format has no version: other
releases may print another one, which gives no kernels.
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
    """An operand of a kernel. dtype: as the log spells it, such as Float, Half, Int8."""

    name: str
    elements: int
    dtype: str

    @property
    def size_bytes(self) -> int:
        return self.elements * BYTES[self.dtype]


@dataclass(frozen=True)
class KernelTime:
    """One launch. kind: correlation, gemm, kgen (generated) and others. nodes: of the ONNX graph, that it computes."""

    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    @property
    def traffic_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in (*self.inputs, *self.constants, *self.outputs))


def read_kernels(text: str) -> list[KernelTime]:
    """The kernels in a layer log, in order; empty where it has none that are understood."""
    found = (KERNEL.match(line) for line in text.splitlines())
    return [
        KernelTime(match[1], _tensors(match[2]), _tensors(match[3]), _tensors(match[4]), tuple(NODE.findall(match[5])))
        for match in found
        if match and match[1] not in NO_WORK
    ]


def traffic_bytes(kernels: Iterable[KernelTime]) -> int:
    return sum(kernel.traffic_bytes for kernel in kernels)


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, math.prod(int(size) for size in sizes.split(",") if size), dtype)
        for name, sizes, dtype in TENSOR.findall(text)
    )

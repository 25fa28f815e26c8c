"""Rules for Q/DQ pairs, and int8 operators in place of an operator between such pairs.

before:  DequantizeLinear(%q) -> Conv(.., DequantizeLinear(W)) -> [Relu ->] QuantizeLinear -> %r
after:   CONV_2D(%q, W, bias) -> %r, all int8; a float reader of %r gets a DEQUANTIZE

ONNX's activations are uint8; TFLite's are int8, which are the same numbers less 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.export.litert.flatbuffer import Scale
from evm_deploy.export.litert.layout import Order
from evm_deploy.export.litert.translate import Node, Rounded, Rule, Translation, Value

INT8 = np.iinfo(np.int8)
SHIFT = {"uint8": 128, "int8": 0}  # zero points of uint8 less this are those of int8
#: Versions of the kernels that take int8.
VERSIONS = {"ADD": 2, "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 12, "MEAN": 2, "MUL": 2}


@dataclass(frozen=True)
class Int8Output:
    """Output of an int8 operator: scale, names of the values that it stands for, and whether a ReLU is in it.

    name: of the rounded value. exact: those before it, which exist rounded alone.
    """

    scale: Scale
    name: str
    exact: tuple[str, ...]
    relu: bool


def activation_scale(node: Node) -> Scale:
    """Return the scale of a Q or DQ node of an activation, for int8."""
    scale, zero = node.constant(1), node.constant(2)
    if scale is None or scale.size != 1 or zero is None or str(zero.dtype) not in SHIFT:
        raise node.refused("its scale is not one of int8 or uint8")
    return Scale(np.float32(scale).reshape(1), int(zero.reshape(())) - SHIFT[str(zero.dtype)])


def quantize(t: Translation, node: Node) -> None:
    """Translate QuantizeLinear of an activation."""
    x, scale = node.input(0), activation_scale(node)
    if x.rounded and x.rounded.scale.key == scale.key:
        tensor = x.rounded.tensor
    else:
        tensor = t.file.tensor(node.outputs[0], t.file.shapes[x.tensor], "int8", scale)
        t.file.operator("QUANTIZE", [x.tensor], [tensor])
    t.values[node.outputs[0]] = Value(x.shape, "int8", tensor, x.order, rounded=Rounded(scale, tensor))


def dequantize(t: Translation, node: Node) -> None:
    """Translate DequantizeLinear of an activation. If no operator reads the floats, DEQUANTIZE is dropped."""
    x = node.input(0)
    if x.rounded is None or x.rounded.scale.key != activation_scale(node).key:
        raise node.refused("it reads no QuantizeLinear of the same scale")
    t.emit(node, "DEQUANTIZE", [x.tensor], x.order)
    t.values[node.outputs[0]] = replace(t.values[node.outputs[0]], rounded=x.rounded)


def relu(t: Translation, node: Node) -> None:
    """Translate Relu: nothing for integers none of which stands for a negative number."""
    x = node.input(0)
    if x.rounded and x.rounded.scale.zero == INT8.min:
        t.write(node, x.tensor, x.order, rounded=x.rounded)
    else:
        t.emit(node, "RELU", [x.tensor], x.order)


def int8_output(t: Translation, node: Node, *, relu: bool = False) -> Int8Output | None:
    """Return the int8 output of an operator if one QuantizeLinear alone reads it, or with `relu` behind a ReLU."""
    names, found = [node.outputs[0]], False
    while len(t.readers.get(names[-1], ())) == 1 and names[-1] not in t.results:
        (reader,) = t.readers[names[-1]]
        if reader.op_type == "QuantizeLinear" and reader.input[0] == names[-1]:
            inputs = tuple(t.values[name] for name in reader.input[1:])
            scale = activation_scale(Node(reader.op_type, reader.name, (None, *inputs), tuple(reader.output)))
            return Int8Output(scale, reader.output[0], tuple(names), found)
        if not relu or found or reader.op_type != "Relu":
            break
        names.append(reader.output[0])
        found = True
    return None


class Operation:
    """An operator in int8 if all that it reads is rounded and one QuantizeLinear reads its output; else in float.

    values: the inputs at the places `reads`, as int8 or float. constants: places of further inputs, which must be
    rounded too. relu: whether a ReLU behind the operator may be part of it. exact: compute in float.
    """

    def __init__(
        self,
        t: Translation,
        node: Node,
        reads: Sequence[int] = (0,),
        constants: Sequence[int] = (),
        *,
        relu: bool = False,
        exact: bool = False,
    ) -> None:
        self.t, self.node = t, node
        given = [node.input(i) for i in reads]
        fixed = [value for i in constants if (value := node.given(i)) is not None]
        rounded = all(v.rounded and v.rounded.tensor >= 0 for v in given)
        rounded = rounded and all(v.rounded and v.rounded.data is not None for v in fixed)
        self.made = int8_output(t, node, relu=relu) if rounded and not exact else None
        self.values = [as_int8(value) for value in given] if self.made else given

    def weight(self, place: Sequence[int], shape: Sequence[int], axis: int, factor: float = 1.0) -> int:
        """Return the tensor of input 1: transposed by `place` and reshaped, with its output channels along `axis`."""
        value, name = self.node.input(1), f"{self.node.name}/weight"
        if self.made:
            assert value.rounded is not None and value.rounded.data is not None
            numbers = np.transpose(value.rounded.data, place).reshape(shape)
            return self.t.file.constant(numbers, name, replace(value.rounded.scale, axis=axis))
        data = self.node.constant(1)
        assert data is not None
        return self.t.weight(np.transpose(data, place).reshape(shape) * np.float32(factor), name)

    def bias(self, channels: int, factor: float = 1.0) -> int:
        """Return the tensor of input 2, zeros if there is none: float32, or int32 of the scale of the products."""
        value, name = self.node.given(2), f"{self.node.name}/bias"
        if self.made:
            x, weight = self.values[0].rounded, self.node.input(1).rounded
            assert x is not None and weight is not None
            integers = value.rounded.data if value is not None and value.rounded is not None else None
            numbers = np.zeros(channels, np.int32) if integers is None else integers.astype(np.int32).reshape(-1)
            return self.t.file.constant(
                numbers, name, Scale(np.float32(x.scale.scale * weight.scale.scale).reshape(-1))
            )
        found = self.node.constant(2)
        data = np.zeros(channels, np.float32) if found is None else found.reshape(-1) * np.float32(factor)
        return self.t.constant(np.broadcast_to(data, (channels,)), name)

    def add(self, code: str, inputs: Sequence[int], shape: Sequence[int], *, dtype: str = "", **options: Any) -> int:
        """Add the operator. Returns its tensor. shape: of the tensor. dtype: of a result in float, as in `add`."""
        if not self.made:
            return self.t.add(code, inputs, shape, dtype, self.node.outputs[0], **options)
        tensor = self.t.file.tensor(self.made.name, shape, "int8", self.made.scale)
        if self.made.relu:
            options["fusedActivationFunction"] = self.t.file.schema.ActivationFunctionType.RELU
        self.t.file.operator(code, inputs, [tensor], version=VERSIONS[code], **options)
        return tensor

    def write(self, tensor: int, order: Order) -> None:
        """Make a tensor the output of the node, and in int8 of the nodes that are part of the operator."""
        if not self.made:
            self.t.write(self.node, tensor, order)
            return
        shape = self.t.shapes[self.node.outputs[0]][0]
        value = Value(shape, "int8", tensor, order, rounded=Rounded(self.made.scale, tensor))
        self.t.values.update(dict.fromkeys((self.made.name, *self.made.exact), value))


def as_int8(value: Value) -> Value:
    """Return the integers of a value that is rounded."""
    assert value.rounded is not None
    return replace(value, dtype="int8", tensor=value.rounded.tensor)


def in_float(value: Value, found: NDArray[Any]) -> NDArray[Any]:
    """Return the real numbers of a tensor of the file."""
    if value.rounded is None or found.dtype != np.int8:
        return found
    scale = value.rounded.scale
    return (found.astype(np.float32) - scale.zero) * scale.scale.reshape(())


RULES: dict[str, Rule] = {"DequantizeLinear": dequantize, "QuantizeLinear": quantize, "Relu": relu}

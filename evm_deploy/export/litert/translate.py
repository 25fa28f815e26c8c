"""Translation of a loop-free ONNX graph with static shapes to a TFLite file, node by node.

`operators` and `layers` have the rules. A node of constants alone is computed here, and not at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import UsageError
from evm_deploy.export.litert.flatbuffer import FlatBuffer, Scale
from evm_deploy.export.litert.layout import Order, identity, moves, permuted, same_data

if TYPE_CHECKING:
    import onnx

SHORT = {"int64": "int32", "float64": "float32"}  # LiteRT's kernels take few types: indices are int32 in the file
INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Rounded:
    """Integers that stand for a value. tensor: int8 in the order of the value; data: of a constant, in its own axes."""

    scale: Scale
    tensor: int = -1
    data: NDArray[Any] | None = None


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph: constant data, or a tensor of the file with the order of its axes.

    shape: of the value, not of the tensor. dtype: numpy's name. rounded: the same value as integers, if it is known to
    be rounded.
    """

    shape: tuple[int, ...]
    dtype: str
    tensor: int = -1
    order: Order = ()
    data: NDArray[Any] | None = None
    rounded: Rounded | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Node:
    """A node of the ONNX graph with its values. `get(name, default)`: an attribute."""

    op: str
    name: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the attribute `name`, texts as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def input(self, index: int) -> Value:
        """Return an input that must be there."""
        value = self.inputs[index]
        assert value is not None, f"{self.name} has no input {index}"
        return value

    def given(self, index: int) -> Value | None:
        """Return an input, or None if it was left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def constant(self, index: int) -> NDArray[Any] | None:
        """Return the data of an input, None if it was left out. Raises UsageError if it depends on the image."""
        value = self.given(index)
        if value is not None and value.data is None:
            raise self.refused(f"input {index} depends on the image")
        return None if value is None else value.data

    def refused(self, why: str) -> UsageError:
        """Return the error for a node that cannot be translated."""
        return UsageError(
            f"LiteRT: {self.name} ({self.op}) cannot be translated: {why}", "export it with --target onnx"
        )


Rule = Callable[["Translation", Node], None]


class Translation:
    """A graph on its way from ONNX to TFLite.

    rules: by operator. versions: as in `FlatBuffer`. half: store the weights of layers as float16.
    values: of the ONNX graph by name. shapes: shape and dtype of every value by name. inputs, outputs: tensors by name.
    """

    def __init__(
        self, model: onnx.ModelProto, rules: Mapping[str, Rule], versions: Mapping[str, int], *, half: bool = False
    ) -> None:
        from onnx import numpy_helper

        self.half = half
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.results = {value.name for value in model.graph.output}
        self.file = FlatBuffer(versions)
        self.rules = rules
        self.shapes = described(model)
        self.values: dict[str, Value] = {}
        self._arranged: dict[tuple[int, tuple[int, ...], Order], int] = {}
        for tensor in model.graph.initializer:
            self.keep(tensor.name, numpy_helper.to_array(tensor))
        self.inputs = {}
        for value in model.graph.input:
            if value.name not in self.values:
                shape, dtype = self.shapes[value.name]
                tensor = self.file.tensor(value.name, shape, dtype)
                self.values[value.name] = Value(shape, dtype, tensor, identity(len(shape)))
                self.inputs[value.name] = tensor
        for node in model.graph.node:
            self.translate(node)
        self.outputs = {value.name: self.arranged(self.values[value.name]) for value in model.graph.output}
        self.file.drop_unread(self.outputs.values())

    def translate(self, proto: onnx.NodeProto) -> None:
        """Translate one node. Raises UsageError for a node without a rule, and for one that its rule refuses.

        A node whose outputs are there was translated with one before it.
        """
        from onnx import helper

        if all(name in self.values for name in proto.output if name):
            return
        attributes = {each.name: helper.get_attribute_value(each) for each in proto.attribute}
        inputs = tuple(self.values[name] if name else None for name in proto.input)
        node = Node(proto.op_type, proto.name or proto.output[0], inputs, tuple(proto.output), attributes)
        if proto.op_type == "Shape":
            first, end = node.get("start", 0), node.get("end", None)
            self.keep(proto.output[0], np.array(node.input(0).shape[first:end], np.int64))
        elif all(value is None or value.data is not None for value in inputs):
            self._compute(proto, node)
            if proto.op_type == "DequantizeLinear":
                self.values[proto.output[0]] = replace(self.values[proto.output[0]], rounded=constant_of(node))
        elif proto.op_type in self.rules and not proto.domain:
            self.rules[proto.op_type](self, node)
        else:
            raise node.refused("evm-deploy has no rule for this operator")

    def keep(self, name: str, data: NDArray[Any]) -> None:
        """Make `name` a constant."""
        self.values[name] = Value(data.shape, str(data.dtype), data=data)

    def constant(self, data: NDArray[Any] | Sequence[int] | float, name: str = "constant") -> int:
        """Return the tensor of a constant; int64 and Python's numbers become int32 and float32."""
        array = np.asarray(data)
        if array.dtype == np.int64:
            array = array.clip(INT32.min, INT32.max)
        return self.file.constant(array.astype(SHORT.get(str(array.dtype), array.dtype)), name)

    def weight(self, data: NDArray[Any], name: str) -> int:
        """Return the tensor of a layer's weight: float32, which LiteRT makes once from float16 if the file has that."""
        if not self.half:
            return self.constant(data, name)
        return self.add("DEQUANTIZE", [self.file.constant(data.astype(np.float16), name)], data.shape, "float32")

    def arranged(self, value: Value, order: Order | None = None) -> int:
        """Return a tensor of a value with the axes in this order, by default the value's own."""
        order = identity(value.rank) if order is None else order
        if value.data is not None:
            return self.constant(np.transpose(value.data, order))
        if order == value.order:
            return value.tensor
        key = value.tensor, value.order, order
        if key not in self._arranged:
            shape = permuted(value.shape, order)
            if same_data(value.shape, value.order, order):
                self._arranged[key] = self.reshape(value.tensor, shape)
            else:
                perm = self.constant(moves(value.order, order))
                self._arranged[key] = self.add("TRANSPOSE", [value.tensor, perm], shape)
        return self._arranged[key]

    def reshape(self, tensor: int, shape: Sequence[int]) -> int:
        """Return a tensor with the same data and another shape; the tensor itself if it has this shape."""
        if self.file.shapes[tensor] == tuple(shape):
            return tensor
        key = tensor, tuple(shape), ()
        if key not in self._arranged:
            self._arranged[key] = self.add("RESHAPE", [tensor, self.constant(list(shape))], shape, newShape=list(shape))
        return self._arranged[key]

    def add(
        self, code: str, inputs: Sequence[int], shape: Sequence[int], dtype: str = "", name: str = "", **options: Any
    ) -> int:
        """Add an operator of one output of this shape. Returns its tensor. dtype: by default the first input's."""
        same = not dtype or dtype == self.file.dtypes[inputs[0]]
        scale = self.file.scales[inputs[0]] if same else None
        made = self.file.tensor(name or code.lower(), shape, dtype or self.file.dtypes[inputs[0]], scale)
        self.file.operator(code, inputs, [made], **options)
        return made

    def emit(self, node: Node, code: str, inputs: Sequence[int], order: Order, index: int = 0, **options: Any) -> None:
        """Add the operator that computes an output of a node, in this order of axes."""
        shape, dtype = self.shapes[node.outputs[index]]
        tensor = self.add(code, inputs, permuted(shape, order), dtype, node.outputs[index], **options)
        self.write(node, tensor, order, index)

    def write(self, node: Node, tensor: int, order: Order, index: int = 0, *, rounded: Rounded | None = None) -> None:
        """Make a tensor an output of a node. rounded: the integers that the tensor stands for, in the same order."""
        name = node.outputs[index]
        shape, dtype = self.shapes[name]
        found = self.file.shapes[tensor], self.file.dtypes[tensor]
        assert found == (permuted(shape, order), dtype), f"{node.name}: {found}, expected {shape} {dtype} in {order}"
        self.values[name] = Value(shape, dtype, tensor, order, rounded=rounded)

    def _compute(self, proto: onnx.NodeProto, node: Node) -> None:
        """Compute a node of constants."""
        from onnx.reference import ReferenceEvaluator

        feeds = {name: value.data for name, value in zip(proto.input, node.inputs, strict=True) if value is not None}
        results = ReferenceEvaluator(proto).run(None, feeds)
        for name, result in zip(proto.output, results, strict=True):
            if name:
                self.keep(name, np.asarray(result))


def constant_of(node: Node) -> Rounded:
    """Return the integers of a constant behind DequantizeLinear: int8 or int32, without a zero point."""
    data, scale = node.input(0).data, node.constant(1)
    assert data is not None and scale is not None
    return Rounded(Scale(scale, axis=node.get("axis", 1) % max(1, data.ndim) if scale.ndim else 0), data=data)


def described(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype, as in the file, of every value of a graph whose shapes have been inferred."""
    from onnx import helper

    found = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        found[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim), SHORT.get(dtype, dtype)
    return found

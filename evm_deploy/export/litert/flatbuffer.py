"""A TFLite file in memory: tensors, operators and constants of one subgraph, written with the schema of LiteRT itself.

The format is the public FlatBuffers schema `schema.fbs` of LiteRT, whose Python classes are in the package
`ai-edge-litert`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 16  # bytes, of constants in the file: `force_align` in schema.fbs
IDENTIFIER = b"TFL3"
SIGNATURE = "serving_default"  # TensorFlow's name of the only signature
GREATER = 127  # deprecated_builtin_code of operators whose code does not fit in it
TYPES = {
    "float32": "FLOAT32",
    "float16": "FLOAT16",
    "int32": "INT32",
    "uint8": "UINT8",
    "int64": "INT64",
    "bool": "BOOL",
    "int8": "INT8",
}


@dataclass(frozen=True)
class Scale:
    """Meaning of integers: real = scale * (number - zero). scale: one, or one for each place along `axis`."""

    scale: NDArray[np.float32]
    zero: int = 0
    axis: int = 0

    @property
    def key(self) -> tuple[bytes, int, int]:
        """Value by which equal scales are equal."""
        return self.scale.tobytes(), self.zero, self.axis


def schema() -> Any:
    """Import the classes of the file format, without LiteRT's libraries."""
    import ai_edge_litert.schema_py_generated as found

    return found


class FlatBuffer:
    """The model under construction. Tensors are known by their index in the subgraph.

    `versions`: operator -> version of its kernel, where that is not 1.
    """

    def __init__(self, versions: Mapping[str, int]) -> None:
        self.schema = schema()
        self.versions = versions
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[str] = []
        self.scales: list[Scale | None] = []
        self._names: Counter[str] = Counter()
        self._codes: dict[tuple[str, int], int] = {}
        self._constants: dict[tuple[Any, ...], int] = {}
        self._buffers: list[bytes] = [b""]  # number 0 is that of tensors without data
        self._tensors: list[Any] = []
        self._operators: list[Any] = []

    @property
    def count(self) -> int:
        """Number of operators."""
        return len(self._operators)

    def tensor(self, name: str, shape: Sequence[int], dtype: str, scale: Scale | None = None) -> int:
        """Add a tensor without data. Returns its index. A name that is taken gets a number. scale: of integers."""
        return self._add(name, shape, dtype, 0, scale)

    def constant(self, value: NDArray[Any], name: str = "constant", scale: Scale | None = None) -> int:
        """Add a constant, or return the index of an equal one. scale: of integers that stand for real numbers."""
        data = np.ascontiguousarray(value)
        key = (str(data.dtype), value.shape, data.tobytes(), scale.key if scale else None)
        if key not in self._constants:
            self._buffers.append(key[2])
            self._constants[key] = self._add(name, value.shape, str(data.dtype), len(self._buffers) - 1, scale)
        return self._constants[key]

    def operator(
        self, code: str, inputs: Sequence[int], outputs: Sequence[int], *, version: int = 0, **options: Any
    ) -> None:
        """Add an operator by its name in the schema. version: of its kernel. options: fields of its options table."""
        made = self.schema.OperatorT()
        number = version or self.versions.get(code, 1)
        made.opcodeIndex = self._codes.setdefault((code, number), len(self._codes))
        made.inputs, made.outputs = list(inputs), list(outputs)
        table = OPTIONS.get(code, "".join(part.title() for part in code.split("_")) + "Options")
        if hasattr(self.schema, f"{table}T"):
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, table)
            made.builtinOptions = getattr(self.schema, f"{table}T")()
            for key, value in options.items():
                if not hasattr(made.builtinOptions, key):
                    raise ValueError(f"{table} has no field {key}")
                setattr(made.builtinOptions, key, value)
        elif options:
            raise ValueError(f"{code} has no options")
        self._operators.append(made)

    def finish(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], description: str, metadata: Mapping[str, bytes]
    ) -> bytes:
        """Return the file. inputs, outputs: names in the signature -> tensors. metadata: further buffers by name."""
        model = self.schema.ModelT()
        model.version, model.description = 3, description
        subgraph = self.schema.SubGraphT()
        subgraph.name, subgraph.tensors, subgraph.operators = "main", self._tensors, self._operators
        model.subgraphs, model.operatorCodes = [subgraph], [self._code(*code) for code in self._codes]
        model.metadata = []
        for name, data in metadata.items():
            entry = self.schema.MetadataT()
            entry.name, entry.buffer = name, len(self._buffers)
            self._buffers.append(data)
            model.metadata.append(entry)
        set_signature(model, inputs, outputs)
        model.buffers = []
        for data in self._buffers:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(data, np.uint8) if data else None
            model.buffers.append(buffer)
        return pack(model)

    def drop_unread(self, outputs: Iterable[int]) -> None:
        """Remove the operators that compute none of these tensors."""
        self._operators = behind(self._operators, outputs)

    def _add(self, name: str, shape: Sequence[int], dtype: str, buffer: int, scale: Scale | None) -> int:
        made = self.schema.TensorT()
        count = self._names[name]
        self._names[name] += 1
        made.name = f"{name};{count}" if count else name
        made.shape = np.array(shape, np.int32)
        made.type = getattr(self.schema.TensorType, TYPES[dtype])
        made.buffer = buffer
        if scale:
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = scale.scale.astype(np.float32).reshape(-1)
            made.quantization.zeroPoint = np.full(made.quantization.scale.size, scale.zero, np.int64)
            made.quantization.quantizedDimension = scale.axis
        self._tensors.append(made)
        self.shapes.append(tuple(shape))
        self.dtypes.append(dtype)
        self.scales.append(scale)
        return len(self._tensors) - 1

    def _code(self, name: str, version: int) -> Any:
        made = self.schema.OperatorCodeT()
        made.builtinCode = getattr(self.schema.BuiltinOperator, name)
        made.deprecatedBuiltinCode = min(made.builtinCode, GREATER)
        made.version = version
        return made


#: Operators whose options table is not named after them.
OPTIONS = {
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MEAN": "ReducerOptions",
    "SUM": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "REDUCE_PROD": "ReducerOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "TOPK_V2": "TopKV2Options",
    "PADV2": "PadV2Options",
    "SELECT_V2": "SelectV2Options",
    "LOGISTIC": "",
    "RELU": "",
}


def read(data: bytes) -> Any:
    """Return the model of a file as objects that can be changed: `ModelT` of the schema."""
    return schema().ModelT.InitFromPackedBuf(data, 0)


def signature(model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the tensors of inputs and outputs by their names in the signature."""
    found = model.signatureDefs[0]
    return tuple({each.name.decode(): int(each.tensorIndex) for each in side} for side in (found.inputs, found.outputs))  # type: ignore[return-value]


def set_signature(model: Any, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
    """Set inputs and outputs of a model and of its signature: names -> tensors."""
    found = schema()

    def entries(tensors: Mapping[str, int]) -> list[Any]:
        made = [found.TensorMapT() for _ in tensors]
        for entry, (name, tensor) in zip(made, tensors.items(), strict=True):
            entry.name, entry.tensorIndex = name, tensor
        return made

    model.signatureDefs = [found.SignatureDefT()]
    model.signatureDefs[0].signatureKey = SIGNATURE
    model.signatureDefs[0].inputs, model.signatureDefs[0].outputs = entries(inputs), entries(outputs)
    model.subgraphs[0].inputs, model.subgraphs[0].outputs = list(inputs.values()), list(outputs.values())


def part(model: Any, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> bytes:
    """Return the file of that part of a model which computes tensors from others: names -> tensors."""
    graph = model.subgraphs[0]
    operators = [copy.copy(each) for each in behind(graph.operators, [*outputs.values()], inputs.values())]
    used = {*inputs.values(), *outputs.values()}.union(*({*each.inputs, *each.outputs} for each in operators)) - {-1}
    places = {-1: -1, **{int(tensor): place for place, tensor in enumerate(sorted(used))}}
    for each in operators:
        each.inputs, each.outputs = ([places[int(i)] for i in side] for side in (each.inputs, each.outputs))
    tensors = [copy.copy(graph.tensors[i]) for i in sorted(used)]
    numbers = {number: place for place, number in enumerate(sorted({0, *(each.buffer for each in tensors)}))}
    made = copy.copy(model)
    made.buffers, made.metadata = [model.buffers[number] for number in numbers], []
    for each in tensors:
        each.buffer = numbers[each.buffer]
    made.subgraphs = [copy.copy(graph)]
    made.subgraphs[0].tensors, made.subgraphs[0].operators = tensors, operators
    renamed = ({name: places[tensor] for name, tensor in side.items()} for side in (inputs, outputs))
    set_signature(made, *renamed)
    return pack(made)


def behind(operators: Sequence[Any], tensors: Iterable[int], ends: Iterable[int] = ()) -> list[Any]:
    """Return the operators that compute `tensors` from the tensors `ends` and constants, in their order."""
    makers = {int(made): operator for operator in operators for made in operator.outputs}
    waiting, found, known = [*tensors], set(), set(ends)
    while waiting:
        tensor = int(waiting.pop())
        operator = makers.get(tensor)
        if tensor not in known and operator is not None and id(operator) not in found:
            found.add(id(operator))
            waiting.extend(operator.inputs)
    return [operator for operator in operators if id(operator) in found]


def pack(model: Any) -> bytes:
    """Return the file of a model, with aligned constants."""
    import flatbuffers

    class Builder(flatbuffers.Builder):  # type: ignore[misc]
        def CreateNumpyVector(self, x: NDArray[Any]) -> Any:  # noqa: N802  the library's name
            if x.dtype == np.uint8 and x.ndim == 1:
                self.Prep(ALIGNMENT, len(x))
            return super().CreateNumpyVector(x)

    builder = Builder(1024)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())

"""Helpers for ONNX models that several packages share."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def constants_sha256(model: onnx.ModelProto) -> str:
    """Return the SHA-256 of a graph's initializers (names and values) as hex digits."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model with its nodes in topological order: converters append new nodes at the end."""
    import onnx_ir

    ordered = onnx_ir.from_proto(model)
    ordered.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(ordered)
    return result


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model with every call of a model-local function replaced by the function's body."""
    from onnx import inliner

    result: onnx.ModelProto = inliner.inline_local_functions(model)
    return result


def constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the constant of a value as an array. None for no constant, and for a graph input, which callers set."""
    import onnx_ir

    tensor = None if value is None or value.is_graph_input() else onnx_ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_constant(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    """Register an initializer in a graph that has no value of this name. Returns its value."""
    import onnx_ir

    tensor = onnx_ir.tensor(value, name=name)
    new = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(new)
    return new

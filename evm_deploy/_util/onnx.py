"""Small things that several parts do with ONNX models."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def constants_sha256(model: onnx.ModelProto) -> str:
    """Hex digest of a graph's constants, names and values."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, its nodes in topological order: converters append theirs at the end."""
    import onnx_ir

    ordered = onnx_ir.from_proto(model)
    ordered.graph.sort()
    result: onnx.ModelProto = onnx_ir.to_proto(ordered)
    return result


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its functions in the place of their calls."""
    from onnx import inliner

    result: onnx.ModelProto = inliner.inline_local_functions(model)
    return result

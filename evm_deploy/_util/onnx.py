"""Helpers for ONNX models that several packages share."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


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

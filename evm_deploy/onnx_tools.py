"""What several parts do with ONNX models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from evm_deploy import float16

if TYPE_CHECKING:
    import onnx

    from evm_deploy.export.graph import ScanSite


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


def check_fp16_range(model: onnx.ModelProto, sites: Iterable[ScanSite]) -> None:
    """Raise UsageError naming a weight that float16 cannot hold. Scans stay float32."""
    from onnx import TensorProto, numpy_helper

    scan_constants = {name for site in sites for name in site.reads.values()}
    float16.check_range(
        (tensor.name, numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scan_constants
    )

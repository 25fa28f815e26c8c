"""Conversion of ONNX models to float16, for several targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from evm_deploy._util.onnx import in_order
from evm_deploy.export.hub import float16
from evm_deploy.export.hub.suppression import selection_nodes
from evm_deploy.scan.onnx_function import OP_TYPE

if TYPE_CHECKING:
    import onnx

    from evm_deploy.export.hub.graph import ScanSite


def check_fp16_range(model: onnx.ModelProto, sites: Iterable[ScanSite]) -> None:
    """Raise UsageError naming a weight that float16 cannot hold. Scans stay float32: their constants may be larger."""
    from onnx import TensorProto, numpy_helper

    scan_constants = {name for site in sites for name in site.reads.values()}
    float16.check_range(
        (tensor.name, numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scan_constants
    )


def to_fp16(model: onnx.ModelProto, sites: Iterable[ScanSite]) -> onnx.ModelProto:
    """Convert weights and activations to float16. Inputs and outputs keep their types; scans stay float32 with casts.

    Changes `model`; use the result. Raises UsageError naming a weight that float16 cannot hold.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    check_fp16_range(model, sites)
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in [value for value in model.graph.value_info if value.name in constants]:
        model.graph.value_info.remove(value)  # otherwise the converter puts casts between a scan and its constants
    functions = list(model.functions)
    half: onnx.ModelProto = convert_float_to_float16(
        model,
        keep_io_types=True,
        disable_shape_infer=True,
        min_positive_val=5.97e-8,  # smallest float16; the converter's default would change small weights more
        op_block_list=[OP_TYPE, "Resize"],
        node_block_list=list(selection_nodes(model)),
    )
    if not half.functions:
        half.functions.extend(functions)
    return in_order(half)

"""Passes on loop-free graphs for operators of QNN 2.51 whose results are wrong on its emulator of the NPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from evm_deploy.scan.unrolled import chunk_length

if TYPE_CHECKING:
    import onnx

LEAST_EXPONENT = -50.0  # its exponential is 0 in float16


def steps_per_chunk(K: int, L: int) -> int:
    """Return the steps per chunk of an unrolled scan: as for other targets, but never as many chunks as directions.

    With K chunks QNN takes the two axes for each other, and up to half of the results are wrong.
    """
    usual = chunk_length(L)
    return next((T for T in (usual, *range(usual - 1, 0, -1), *range(usual + 1, L + 1)) if -(-L // T) != K), usual)


def floor_exponents(model: onnx.ModelProto) -> int:
    """Limit the input of every Exp to LEAST_EXPONENT, in place. Returns how many.

    QNN's exponential in float16 is right down to -85, and -131008 or +131008 for many values below -88.

    before:  %2 = Exp(%1)
    after:   %3 = Clip(%1, -50);  %2 = Exp(%3)
    """
    from onnx import helper, numpy_helper

    limit = "least_exponent"
    kept: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "Exp":
            limited = f"{node.input[0]}_of_{node.name}"
            kept.append(helper.make_node("Clip", [node.input[0], limit], [limited], name=f"{node.name}_limit"))
            node.input[0] = limited
            count += 1
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if count:
        model.graph.initializer.append(numpy_helper.from_array(np.array(LEAST_EXPONENT, np.float32), limit))
    return count


def cast_by_int32(model: onnx.ModelProto) -> int:
    """Cast uint8 inputs of the graph to float by int32, in place. Returns how many.

    QNN's cast of uint8 to float gives 1 for every value that is not 0.

    before:  %1 = Cast(image, float)
    after:   %2 = Cast(image, int32);  %1 = Cast(%2, float)
    """
    from onnx import TensorProto, helper

    bytes_in = {value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    kept: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "Cast" and node.input[0] in bytes_in:
            whole = f"{node.input[0]}_of_{node.name}"
            kept.append(
                helper.make_node("Cast", [node.input[0]], [whole], name=f"{node.name}_int32", to=TensorProto.INT32)
            )
            node.input[0] = whole
            count += 1
        kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return count

"""Fusion of a module's nodes into one node, with the same nodes as its portable body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evm_deploy.calib.quantize import QUANTIZED
from evm_deploy.errors import ToolchainError
from evm_deploy.export.hub.naming import below
from evm_deploy.scan import onnx_function
from evm_deploy.scan.fused import SCAN_OUTPUTS, FusedOp

if TYPE_CHECKING:
    import onnx

SAME = 1e-6  # relative tolerance: the graph's folded constants and the module's own may differ in the last bit


def match_constants(model: onnx.ModelProto, path: str, op: FusedOp, names: Mapping[int, str]) -> FusedOp:
    """Find the constants of `op`, the module `path`, in the traced `model`. Returns `op` with their names.

    Call this function right after tracing, because later passes may change the values. names: address of a parameter's
    data -> the parameter's name. Raises ToolchainError for a constant that is not in the graph.
    """
    read = {name for node in model.graph.node if below(path, node.name) for name in node.input}
    used = [tensor for tensor in model.graph.initializer if tensor.name in read]
    found: dict[str, str] = {}
    for operand, value in sorted(op.operands.items(), key=lambda item: item[1].data_ptr() not in names):
        own, taken = names.get(value.data_ptr()), set(found.values())  # tell equal constants apart, as of new norms
        candidates = sorted(used, key=lambda tensor: (tensor.name != own, tensor.name in taken))
        found[operand] = _find(candidates, value.detach().numpy(), f"{path}: {operand}")
    return replace(op, constants=found)


def fuse_module(model: onnx.ModelProto, path: str, op: FusedOp) -> int:
    """Replace the nodes of module `path` by one evm::<op_type> node and a model-local function that holds the nodes.

    before:  %n = LayerNormalization(%x, norm.weight, norm.bias);  %1 = MatMul(%n, in_proj) ..  %out = Add(%x, %9)
    after:   %out = evm::Block(%x, norm.weight, norm.bias, in_proj ..)        the function holds the nodes

    A runtime that has the kernel uses the kernel; any other runs the function's body. The function has further outputs,
    which the node does not request: the tensors that its scan reads and writes. Bodies that differ only in attributes,
    such as the blocks of different stages, share one function (see `_share`). Returns the number of nodes replaced.
    Raises ToolchainError if the nodes do not form a module with one input and one output.
    """
    import onnx
    from onnx import helper

    graph = model.graph
    inside = [node for node in graph.node if below(path, node.name)]
    x, out = _boundary(graph, inside, path)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    used = [constants[name] for name in dict.fromkeys(i for n in inside for i in n.input) if name in constants]
    op_type, operands = _operands(inside, op)
    body = _body(inside, path, {x: "x", **{tensor: name for name, tensor in operands.items()}}, out, constants)
    scan_node = next(node for node in body if node.op_type == onnx_function.OP_TYPE)
    scan = dict(zip(onnx_function.INPUTS, scan_node.input, strict=True)) | {"y": scan_node.output[0]}
    function = helper.make_function(
        onnx_function.DOMAIN,
        op_type,
        ["x", *operands],
        ["out", *(scan[name] for name in SCAN_OUTPUTS)],
        body,
        list(model.opset_import),
    )
    function, attributes = _share(model, function, path)
    node = helper.make_node(
        op_type,
        [x, *operands.values()],
        [out, *[""] * len(SCAN_OUTPUTS)],
        name=f"{path}/{op_type}",
        domain=onnx_function.DOMAIN,
        overload=function.overload,
    )
    node.attribute.extend(attributes)
    at = list(graph.node).index(inside[0])
    kept = [node for node in graph.node if not below(path, node.name)]
    del graph.node[:]
    graph.node.extend([*kept[:at], node, *kept[at:]])
    still_used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in used if tensor.name not in still_used]:
        graph.initializer.remove(tensor)
    known = {name for node in graph.node for name in node.output}
    for value in [value for value in graph.value_info if value.name not in known]:
        graph.value_info.remove(value)
    if function.overload:
        model.ir_version = max(model.ir_version, onnx.IR_VERSION_2024_3_25)
    return len(inside)


def _boundary(graph: onnx.GraphProto, inside: list[onnx.NodeProto], path: str) -> tuple[str, str]:
    """Return the one tensor that the nodes read from outside, and the one tensor of the nodes that is read outside."""
    constants = {tensor.name for tensor in graph.initializer}
    produced = {name for node in inside for name in node.output}
    reads = {name for node in inside for name in node.input if name} - produced - constants
    elsewhere = {name for node in graph.node if not below(path, node.name) for name in node.input}
    writes = produced & (elsewhere | {value.name for value in graph.output})
    if len(reads) != 1 or len(writes) != 1:
        raise ToolchainError(
            f"{path} cannot be fused: its nodes read {sorted(reads)} and write {sorted(writes)}, one each was expected",
            "report this, with the versions of torch, onnx and onnxsim",
        )
    return reads.pop(), writes.pop()


def _operands(inside: list[onnx.NodeProto], op: FusedOp) -> tuple[str, dict[str, str]]:
    """Return the op's type, and the initializer of each operand. An int8 op if layers of the module are quantised."""
    producers = {name: node for node in inside for name in node.output}
    readers = {name: node for node in inside for name in node.input}
    found, rounded = {}, set()
    for name in op.operands:
        weight = f"{op.constants[name]}{QUANTIZED}"
        if weight not in readers:
            found[name] = op.constants[name]
            continue
        scaled = readers[weight]
        if scaled.op_type == "Cast":  # a stack of matrices
            scaled = readers[scaled.output[0]]
        activation = producers[readers[scaled.output[0]].input[0]]
        found[name], found[f"{name}_scale"] = weight, scaled.input[1]
        found[f"{name}_input_scale"], found[f"{name}_input_zero_point"] = activation.input[1], activation.input[2]
        rounded.add(name)
    return op.int8_types[frozenset(rounded)] if rounded else op.op_type, found


def _find(tensors: list[onnx.TensorProto], value: NDArray[np.float32], what: str) -> str:
    """Return the name of the initializer that holds `value`. Compares contents, because exporters rename weights."""
    from onnx import numpy_helper

    for tensor in tensors:
        if tuple(tensor.dims) == value.shape:
            have = numpy_helper.to_array(tensor)
            if have.dtype == value.dtype and np.allclose(have, value, rtol=SAME, atol=0, equal_nan=True):
                return str(tensor.name)
    raise ToolchainError(f"{what} is not among the constants of the graph", "report this, with the version of onnxsim")


def _body(
    inside: list[onnx.NodeProto],
    path: str,
    names: dict[str, str],
    out: str,
    constants: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    """Copy the nodes with new tensor names: `names` for inputs, c<n> for other constants, v<n> for values."""
    import onnx
    from onnx import helper

    names = {**names, out: "out", "": ""}
    body: list[onnx.NodeProto] = []
    for node in inside:
        for name in node.input:
            if name not in names:
                constant = onnx.TensorProto()
                constant.CopyFrom(constants[name])
                constant.name = ""
                names[name] = f"c{len(names)}"
                body.append(helper.make_node("Constant", [], [names[name]], value=constant))
        for name in node.output:
            names.setdefault(name, f"v{len(names)}")
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = node.name.removeprefix(path)[1:]
        copy.input[:] = [names[name] for name in node.input]
        copy.output[:] = [names[name] for name in node.output]
        body.append(copy)
    return body


def _share(
    model: onnx.ModelProto, function: onnx.FunctionProto, path: str
) -> tuple[onnx.FunctionProto, list[onnx.AttributeProto]]:
    """Return the function of the model to call in place of `function`, and the attributes of the call.

    before:  Block() { .. Conv<group=48>(..) .. }, called for blocks of 48 channels; `function` has group=96
    after:   Block<v5_group>() { .. Conv<group=@v5_group>(..) .. }, called with v5_group=48 and v5_group=96

    A body of another structure becomes a function of the same name with another `overload`. ONNX Runtime 1.28 supports
    overloads; ONNX Runtime up to at least 1.24 uses the first body for every call.
    """
    others = [other for other in model.functions if other.name == function.name]
    same = next((other for other in others if _structure(other) == _structure(function)), None)
    if not same:
        function.overload = path if others else ""
        model.functions.append(function)
        return model.functions[-1], []
    calls = [n for n in model.graph.node if (n.op_type, n.overload) == (same.name, same.overload)]
    attributes = []
    for node, new in zip(same.node, function.node, strict=True):
        for mine, its in zip(node.attribute, new.attribute, strict=True):
            if not mine.ref_attr_name and mine != its:
                name = f"{node.output[0]}_{mine.name}"
                for call in calls:
                    call.attribute.append(_renamed(mine, name))
                same.attribute.append(name)
                kind = mine.type
                mine.Clear()
                mine.name, mine.type, mine.ref_attr_name = its.name, kind, name
            if mine.ref_attr_name:
                attributes.append(_renamed(its, mine.ref_attr_name))
    return same, attributes


def _structure(function: onnx.FunctionProto) -> list[object]:
    """Return the structure of a function's body: everything except the values of attributes."""
    return [
        (n.domain, n.op_type, tuple(n.input), tuple(n.output), tuple((a.name, a.type) for a in n.attribute))
        for n in function.node
    ] + [tuple(function.input), tuple(function.output)]


def _renamed(attribute: onnx.AttributeProto, name: str) -> onnx.AttributeProto:
    import onnx

    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.name = name
    return copy

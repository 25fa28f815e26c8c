"""The hub graph of a ready-made ONNX file: its scan nodes become ours, and it gets preprocessing and head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.export.plan import DEFAULT_OPSET, ExportPlan
from evm_deploy.scan import onnx_function
from evm_deploy.scan.onnx_function import Body
from evm_deploy.tasks.classification import PROBABILITIES

if TYPE_CHECKING:
    import onnx

    from evm_deploy.model.foreign.ready import ReadyGraph

OLDEST_OPSET = 18  # of the portable body
OWN = "own."  # prefix of the file's values, beside which the graph gets an input and outputs of other names


def hub_graph(ready: ReadyGraph, wrapped: Any, plan: ExportPlan) -> onnx.ModelProto:
    """Return the graph of a ready-made file with evm::SelectiveScan nodes, in the plan's opset, size and batch.

    wrapped: module of `with_pre_and_postprocessing` around `ready`. Raises UsageError for a batch that the file's graph
    does not take, and ToolchainError for a graph that ONNX cannot convert to the opset.
    """
    import onnx

    model = onnx.compose.add_prefix(ready.model, OWN, rename_nodes=False, rename_functions=False)
    if ready.batch and (not plan.batch.static or plan.batch.min != ready.batch):
        raise UsageError(f"the graph takes a batch of {ready.batch}", f"use --batch {ready.batch}")
    opset = max(plan.opset or DEFAULT_OPSET, OLDEST_OPSET)
    nested = [node for node in model.graph.node if any(each.HasField("g") for each in node.attribute)]
    if nested:
        raise UsageError(
            f"node {nested[0].name} is a {nested[0].op_type}: graphs with loops and branches are not taken",
            "export the file again with fixed sizes, or simplify it with onnxsim",
        )
    try:
        model = onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # of ONNX's converter, in C++
        said = str(error).splitlines()[0][:200]
        raise ToolchainError(f"the graph cannot be converted to opset {opset}: {said}", "see --opset") from error
    model.opset_import.append(onnx.helper.make_opsetid(onnx_function.DOMAIN, onnx_function.VERSION))
    onnx_function.register_schema()
    _name_nodes(model)
    _add_preprocessing(model, ready, wrapped, plan)
    replace_scans(model, ready.scan_ops)
    for opset_id in [each for each in model.opset_import if each.domain in {domain for domain, _ in ready.scan_ops}]:
        model.opset_import.remove(opset_id)
    _add_head(model, wrapped, plan)
    del model.graph.value_info[:]
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return inferred


def replace_scans(model: onnx.ModelProto, kinds: frozenset[tuple[str, str]]) -> int:
    """Replace channels-first scan nodes of others by evm::SelectiveScan, in place. Returns how many.

    before:  %y = domain::Scan(%u, %delta, %A, %B, %C, %D, %bias)          u (b, G Dg, L), B (b, G, N, L) or (b, N, L)
    after:   %1 = Reshape(%u);  %2 = Transpose(%1);  ..  %9 = evm::SelectiveScan(%2, ..);  %y = Reshape(Transpose(%9))

    Raises UsageError for a scan whose numbers of channels, states or groups are not fixed.
    """
    import onnx

    graph, count = model.graph, 0
    while node := next((node for node in graph.node if (node.domain, node.op_type) in kinds), None):
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph  # ends at the next scan of others
        sizes = {
            value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input)
        }
        sizes |= {tensor.name: [*tensor.dims] for tensor in graph.initializer}
        A, B, C = (sizes.get(name, []) for name in (node.input[2], node.input[3], node.input[4]))
        groups = {3: 1, 4: B[1] if len(B) == 4 else 0}.get(len(B), 0)
        if len(A) != 2 or not all(A) or not groups or A[0] % groups or len(C) != len(B) or C[1:-1] != B[1:-1]:
            raise UsageError(
                f"scan node {node.name}: A is {A}, B {B}, C {C} (0: not fixed); A must be (G Dg, N), and B and C "
                "(b, G, N, L) or (b, N, L) of the same G",
                "export the file again with fixed sizes",
            )
        place = list(graph.node).index(node)
        new = _scan_nodes(node, groups, *A)
        graph.node.remove(node)
        for each in reversed(new):
            graph.node.insert(place, each)
        count += 1
    return count


def _scan_nodes(node: onnx.NodeProto, groups: int, channels: int, states: int) -> list[onnx.NodeProto]:
    """Return the nodes that compute one scan node of others."""
    from onnx import helper

    path = node.name.rpartition("/")[0]
    f = Body(f"{node.name}_")
    D, bias = [*node.input[5:], "", ""][:2]

    def last(tensor: str, size: int) -> str:  # (b, G X, L) or (b, G, X, L) -> (b, G, L, X)
        return str(f.op("Transpose", f.op("Reshape", tensor, f.const([0, groups, size, -1])), perm=[0, 1, 3, 2]))

    def constant(tensor: str, *more: int) -> str:  # (G Dg, ..) -> (G, Dg, ..)
        shape = (groups, channels // groups, *more)
        if not tensor:
            return f.const(np.zeros(shape), np.float32)
        return str(f.op("Reshape", tensor, f.const(shape)))

    width = channels // groups
    u, delta, A, B, C = node.input[:5]
    reads = [last(u, width), last(delta, width), constant(A, states), last(B, states), last(C, states)]
    reads += [constant(D), constant(bias)]
    softplus = all(attribute.i for attribute in node.attribute if attribute.name == onnx_function.SOFTPLUS)
    y = f"{node.name}_y"
    kind, domain = onnx_function.OP_TYPE, onnx_function.DOMAIN
    scan = helper.make_node(kind, reads, [y], name=f"{path}/{kind}", domain=domain)
    if not softplus:
        scan.attribute.append(helper.make_attribute(onnx_function.SOFTPLUS, 0))
    f.nodes.append(scan)
    f.write("Reshape", [f.op("Transpose", y, perm=[0, 1, 3, 2]), f.const([0, channels, -1])], node.output[0])
    return f.nodes


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name every node `<path>/<type>`, once. The path is that of the file's own name, with dots: layers.0.mlp.fc1.

    before:  /layers.0/mlp/fc1/MatMul, node_Conv_12, ""
    after:   layers.0.mlp.fc1/MatMul, root/Conv, root/Conv_1
    """
    from evm_deploy.model.foreign.ready import path_of

    used: set[str] = set()
    for node in model.graph.node:
        name, count = f"{path_of(node) or 'root'}/{node.op_type}", 0
        while (unique := f"{name}_{count}" if count else name) in used:
            count += 1
        used.add(unique)
        node.name = unique


def _add_preprocessing(model: onnx.ModelProto, ready: ReadyGraph, wrapped: Any, plan: ExportPlan) -> None:
    """Give the graph the artifact's input: images of uint8 (b, H, W, 3), normalised here, or the tensor itself."""
    from onnx import TensorProto, helper

    graph = model.graph
    batch: int | str = plan.batch.min if plan.batch.static else "batch"
    height, width = plan.imgsz or ready.size
    del graph.input[:]
    if plan.input == "tensor":
        graph.input.append(helper.make_tensor_value_info(plan.input, TensorProto.FLOAT, [batch, 3, height, width]))
        nodes = [helper.make_node("Identity", [plan.input], [OWN + ready.input_name], name="root/Identity_input")]
    else:
        graph.input.append(helper.make_tensor_value_info(plan.input, TensorProto.UINT8, [batch, height, width, 3]))
        f = Body("root/input_")
        scale, shift = (f.const(getattr(wrapped, key).numpy(), np.float32) for key in ("scale", "shift"))
        x = f.op("Add", f.op("Mul", f.op("Cast", plan.input, to=TensorProto.FLOAT), scale), shift)
        f.op("Transpose", x, perm=[0, 3, 1, 2])
        f.nodes[-1].output[0] = OWN + ready.input_name
        nodes = f.nodes
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _add_head(model: onnx.ModelProto, wrapped: Any, plan: ExportPlan) -> None:
    """Name the outputs as the network's, and turn logits into probabilities where the plan asks for it."""
    from onnx import TensorProto, helper

    graph = model.graph
    written = [(value.name, value.type.tensor_type.shape.dim) for value in graph.output]
    del graph.output[:]
    for (inner, dims), name in zip(written, wrapped.outputs, strict=True):
        kind, attributes = "Identity", dict[str, Any]()
        if name == PROBABILITIES:
            independent = plan.multi_label or (dims and dims[-1].dim_value == 1)
            kind, attributes = ("Sigmoid", {}) if independent else ("Softmax", {"axis": -1})
        graph.node.append(helper.make_node(kind, [inner], [name], name=f"root/{kind}_{name}", **attributes))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(dims)))

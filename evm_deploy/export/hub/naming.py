"""Names of nodes after their modules, so that ranges, masks, profiles and reports agree on blocks."""

from __future__ import annotations

import ast
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

SCOPES = "pkg.torch.onnx.name_scopes"


def name_after_modules(model: onnx.ModelProto, root: str) -> int:
    """Name nodes `<module path>/<OpType>`, drop the `root.` of the wrapper, strip the tracer's debug records.

    before:  node_linear_1  scopes ['', 'model', 'model.layers.0', 'model.layers.0.downsample', 'linear_1']
    after:   layers.0.downsample/MatMul      a second one there becomes layers.0.downsample/MatMul_1

    Returns the number of nodes named. Debug records contain source paths of the machine: with them the bytes of a file
    would depend on the folder of the export.
    """
    graph = model.graph
    prefix = root + "."
    rename = {t.name: t.name.removeprefix(prefix) for t in graph.initializer if t.name.startswith(prefix)}
    scope_of: dict[str, str] = {}
    used: Counter[str] = Counter()
    for node in graph.node:
        scope = _scope(node) or next((scope_of[name] for name in node.input if name in scope_of), "")
        scope_of.update(dict.fromkeys(node.output, scope))
        path = "" if scope == root else scope.removeprefix(prefix)
        name = f"{path or 'root'}/{node.op_type}"
        node.name = f"{name}_{used[name]}" if used[name] else name
        used[name] += 1
        for i, tensor in enumerate(node.input):
            node.input[i] = rename.get(tensor, tensor)
        _strip(node)
    for value in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        value.name = rename.get(value.name, value.name)
        _strip(value)
    _strip(graph)
    _strip(model)
    return len(graph.node)


def name_after_neighbours(model: onnx.ModelProto) -> int:
    """Name the nodes that an optimiser created, whose names do not contain their module.

    before:  Gemm_3(%mean, val_98, layers.0.blocks.0.se.global_reduce.bias)
    after:   layers.0.blocks.0.se.global_reduce/Gemm

    The module is that of a parameter that the node reads, else that of the node before it. Returns how many.
    """
    parameters = {tensor.name for tensor in model.graph.initializer if "." in tensor.name}
    used = {node.name for node in model.graph.node if "/" in node.name}
    scope_of: dict[str, str] = {}
    renamed = 0
    for node in model.graph.node:
        if "/" not in node.name:
            owner = next((name.rpartition(".")[0] for name in node.input if name in parameters), None)
            scope = owner or next((scope_of[name] for name in node.input if name in scope_of), "root")
            name, count = f"{scope}/{node.op_type}", 0
            while (unique := f"{name}_{count}" if count else name) in used:
                count += 1
            node.name = unique
            used.add(unique)
            renamed += 1
        scope_of.update(dict.fromkeys(node.output, node.name.rpartition("/")[0]))
    return renamed


def name_values_after_nodes(model: onnx.ModelProto) -> int:
    """Name every value after the node that writes the value, except the graph's outputs.

    A runtime that fuses nodes may keep only the name of one of the nodes' values.

    before:  %relu_3 = Relu(%conv2d_17)       layers.2.1.conv_pw.2/Relu; in ONNX Runtime's profile relu_3_nchwc
    after:   %layers.2.1.conv_pw.2/Relu = ..  a second output is layers.2.1.conv_pw.2/Relu:1

    Returns the number of values named. Nodes must not have subgraphs.
    """
    graph = model.graph
    outputs = {value.name for value in graph.output}
    rename = {
        name: f"{node.name}:{i}" if i else node.name
        for node in graph.node
        for i, name in enumerate(node.output)
        if name and name not in outputs
    }
    for node in graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    for value in graph.value_info:
        value.name = rename.get(value.name, value.name)
    return len(rename)


def call_name(path: str, calls: Counter[str]) -> str:
    """Return the name of a further call of module `path`: `path`, then `path#2`, `path#3`. Counts calls in `calls`."""
    calls[path] += 1
    return path if calls[path] == 1 else f"{path}#{calls[path]}"


def below(path: str, name: str) -> bool:
    """Test whether the node `name` is in module `path`."""
    return name.startswith((path + "/", path + "."))


def _scope(node: onnx.NodeProto) -> str:
    """Return the innermost module path of a node, or "". The last entry of the tracer's record is the operation."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _strip(
    message: onnx.NodeProto | onnx.GraphProto | onnx.ModelProto | onnx.ValueInfoProto | onnx.TensorProto,
) -> None:
    del message.metadata_props[:]
    message.doc_string = ""

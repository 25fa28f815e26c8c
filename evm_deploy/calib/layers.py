"""Layers of an ONNX graph that can become int8, and their activations.

Convolutions and linear layers with constant weights can be quantised. Exceptions: layers that a network keeps in float,
and layers that write a scan's delta, B and C, because these tensors feed exp and the state. A block that runs as one op
may have such layers in int8 too. A network of an unknown family also keeps the layers that write a scan's u and read
its y.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from evm_deploy.scan import onnx_function

if TYPE_CHECKING:
    import onnx

LAYERS = ("Conv", "MatMul", "Gemm")
SCAN_FEEDS = ("delta", "B", "C")  # inputs of a scan that int8 layers must not write
Node = TypeVar("Node")  # of any graph whose tensors have names
NORMS = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization")


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantised.

    module: path of the layer. reads, writes: names of its activations; a ReLU after the layer is included in it.
    float_output: the output is not rounded. weight_only: only the weights become int8, no activation. stacked: the
    weight (K, in, out) has a matrix for each direction of a scan.
    """

    node: str
    module: str
    reads: str
    writes: str
    weight: str
    float_output: bool = False
    weight_only: bool = False
    stacked: bool = False


def quantizable_layers(
    model: onnx.ModelProto,
    keep_float: Collection[str] = (),
    *,
    float_around_scans: bool = False,
    scan_inputs: Collection[str] = (),
) -> list[Layer]:
    """Return the layers of a hub graph that can be quantised, in execution order.

    Layers that write a scan's delta, B and C are left out, except those with a weight in `scan_inputs`, (K, in, out).
    float_around_scans: so are those that write its u, and those that read its y. keep_float: paths of further modules
    whose layers are left out.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    beside = scan_feeding_layers(model)
    if float_around_scans:
        beside |= scan_input_layers(model) | scan_reading_layers(model)
    found = []
    for node in model.graph.node:
        module = node.name.rpartition("/")[0]
        stacked = node.op_type == "MatMul" and node.input[1] in scan_inputs
        wanted = stacked or (_is_layer(node, ranks) and node.name not in beside)
        if not wanted or below_any(module, keep_float):
            continue
        after = readers.get(node.output[0], [])
        relu = after[0] if len(after) == 1 and after[0].op_type == "Relu" else None
        writes = relu.output[0] if relu else node.output[0]
        # a MatMul can give float at no cost; a Conv cannot, because ONNX Runtime fuses only complete Q/DQ pairs
        as_float = node.op_type == "MatMul" and not any(n.op_type in LAYERS for n in readers.get(writes, []))
        found.append(Layer(node.name, module, node.input[0], writes, node.input[1], as_float, stacked=stacked))
    return found


def scan_feeding_layers(model: onnx.ModelProto) -> set[str]:
    """Return the names of LAYERS nodes from which a scan's delta, B and C come, with no other such node in between."""
    places = [onnx_function.INPUTS.index(name) for name in SCAN_FEEDS]
    return _nearest(
        _producers(model), lambda node: node.input, (node.input[i] for node in _scans(model) for i in places)
    )


def scan_input_layers(model: onnx.ModelProto) -> set[str]:
    """Return the names of LAYERS nodes from which a scan's u comes, with no other such node in between.

    Nor is there a norm or a residual in between: what is before them writes the block's input, not the scan's.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    place = onnx_function.INPUTS.index("u")

    def before(node: onnx.NodeProto) -> Iterable[str]:
        residual = node.op_type == "Add" and not constants & set(node.input)
        return () if residual or node.op_type in NORMS else node.input

    return _nearest(_producers(model), before, (node.input[place] for node in _scans(model)))


def _producers(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    return {name: [node] for node in model.graph.node for name in node.output}


def scan_reading_layers(model: onnx.ModelProto) -> set[str]:
    """Return the names of LAYERS nodes that read the output of a scan, with no other such node in between."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return _nearest(readers, lambda node: node.output, (node.output[0] for node in _scans(model)))


def _scans(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == onnx_function.OP_TYPE]


def _nearest(
    neighbours: Mapping[str, Sequence[onnx.NodeProto]],
    onward: Callable[[onnx.NodeProto], Iterable[str]],
    tensors: Iterable[str],
) -> set[str]:
    """Return the names of the first LAYERS nodes on every way from these tensors. A scan ends a way, too."""
    found = nearest(
        neighbours,
        lambda node: node.op_type in LAYERS,
        lambda node: () if node.op_type == onnx_function.OP_TYPE else onward(node),
        tensors,
    )
    return {node.name for node in found}


def nearest(
    neighbours: Mapping[str, Sequence[Node]],
    wanted: Callable[[Node], bool],
    onward: Callable[[Node], Iterable[str]],
    tensors: Iterable[str],
) -> list[Node]:
    """Return the first nodes that are `wanted` on every way from these tensors through a graph.

    neighbours: the nodes at a tensor, by its name. onward: names of the tensors at which a way goes on after a node
    that is not wanted. A node that is reached from several tensors is returned several times.
    """
    found: list[Node] = []
    waiting = list(tensors)
    seen = set(waiting)
    while waiting:
        for node in neighbours.get(waiting.pop(), ()):
            if wanted(node):
                found.append(node)
            else:
                new = set(onward(node)) - seen
                waiting += new
                seen |= new
    return found


def below_any(module: str, paths: Iterable[str]) -> bool:
    """Test whether `module` is one of `paths`, or inside one of them."""
    return any(module == path or module.startswith(path + ".") for path in paths)


def _is_layer(node: onnx.NodeProto, ranks: Mapping[str, int]) -> bool:
    """Test whether a node is a convolution of any rank, or a product with a constant matrix."""
    rank = ranks.get(node.input[1]) if node.op_type in LAYERS else None
    return rank is not None and (node.op_type == "Conv" or rank == 2)


def activations(found: Collection[Layer]) -> dict[str, str]:
    """Map tensor -> key in a calibration table, for every activation of these layers that becomes int8."""
    rounded = [layer for layer in found if not layer.weight_only]
    names = {layer.writes: f"{layer.module}:output" for layer in rounded}
    return {**names, **{layer.reads: f"{layer.module}:input" for layer in rounded}}

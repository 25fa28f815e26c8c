"""Folding of BatchNorm into the convolution before it, in a traced graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from evm_deploy._util.onnx import add_constant, constant_of
from evm_deploy.model import batch_norm

if TYPE_CHECKING:
    import onnx_ir as ir

EPSILON = 1e-5  # ONNX's default


def fold_batch_norm(model: ir.Model) -> int:
    """Fold every BatchNormalization into the Conv before it if nothing else reads the Conv. Returns how many.

    before:  %1 = Conv(%0, conv.weight);  %2 = BatchNormalization(%1, bn.weight, bn.bias, bn.mean, bn.var)
    after:   %2 = Conv(%0, conv.weight, conv.bias)      the node keeps the name of the module `conv`

    Changes `model`. Convolutions may have any rank and grouping, with a bias or without. Weights that another node also
    reads stay unchanged: this convolution gets copies. Constant expressions are computed first, because an absent bias
    is traced as an expression.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    found = [(node, conv) for node in model.graph if (conv := _convolution(node))]
    for norm, conv in found:
        _fold(model.graph, conv, norm)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def _convolution(norm: ir.Node) -> ir.Node | None:
    """Return the Conv that `norm` can be folded into, or None."""
    if (norm.domain, norm.op_type) != ("", "BatchNormalization") or any(output.uses() for output in norm.outputs[1:]):
        return None
    x = norm.inputs[0]
    conv = x.producer() if x else None
    if conv is None or (conv.domain, conv.op_type) != ("", "Conv") or len(x.uses()) > 1 or x.is_graph_output():
        return None
    constant = [value is None or constant_of(value) is not None for value in (*conv.inputs[1:], *norm.inputs[1:])]
    return conv if all(constant) and not norm.attributes.get_int("training_mode", 0) else None


def _fold(graph: ir.Graph, conv: ir.Node, norm: ir.Node) -> None:
    weight, bias = conv.inputs[1], conv.inputs[2] if len(conv.inputs) > 2 else None
    operands: list[Any] = [constant_of(value) for value in (weight, bias, *norm.inputs[1:])]
    operands.append(norm.attributes.get_float("epsilon", EPSILON))
    values = batch_norm.folded(*operands)
    names = (weight.name, weight.name.removesuffix("weight") + "bias")
    conv.resize_inputs(3)
    for i, (name, value) in enumerate(zip(names, values, strict=True), start=1):
        conv.replace_input_with(i, None)  # drop this use first: if it was the only one, the name is free
        conv.replace_input_with(i, _initializer(graph, name, value))
    output, read = conv.outputs[0], norm.outputs[0]
    read.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    output.name, read.name = read.name, None


def _initializer(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    """Register a constant `name`. If another constant in use has the name, a number is appended."""
    old, unique, count = graph.initializers.get(name), name, 0
    if old is not None and not old.uses() and not old.is_graph_output():
        del graph.initializers[name]
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    return add_constant(graph, unique, value)

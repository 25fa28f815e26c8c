"""Decomposition of a traced program for torch.onnx.export, without a second trace.

torch.onnx.export traces a network, then traces the program again to decompose operators that have no ONNX function: a
third of the CPU time of an export. Here the program is copied, with the few operators that visual networks hold of
these replaced, by the same nodes. A program with any other such operator is traced again, as ever.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Graph, Node

    Call = Callable[..., Node]


@contextlib.contextmanager
def copied_decompositions() -> Iterator[None]:
    """Context manager in which torch.onnx.export decomposes programs by `decompose` where that can be done."""
    from torch.export import ExportedProgram

    retrace = ExportedProgram.run_decompositions

    @functools.wraps(retrace)
    def run_decompositions(program: ExportedProgram, table: Any = None, **options: Any) -> Any:
        if table is not None and not options and decompose(program, table):
            return program
        return retrace(program, table, **options)

    ExportedProgram.run_decompositions = run_decompositions  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = retrace  # type: ignore[method-assign]


def decompose(program: ExportedProgram, table: Mapping[Any, Any]) -> bool:
    """Decompose `program` by `table` without a trace, and return True. Returns False, without a change, if it cannot.

    The nodes become those of `program.run_decompositions(table)`, and so do their names in a program of a fixed batch.
    """
    import torch

    if not all(str(size).startswith("s") for size in program.range_constraints):  # u0: a size that depends on values
        return False
    old, new = program.graph_module.graph, torch.fx.Graph()
    sizes: dict[Any, Node] = {}
    forms = _forms(sizes)
    copies: dict[Node, Node | None] = {}
    for node in old.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        if node.op in ("placeholder", "output"):
            copies[node] = new.node_copy(node, copies.__getitem__)
            continue
        call = functools.partial(_call, new, node)
        if form := forms.get(node.target):
            copies[node] = form(call, node.meta.get("val"), *args, **kwargs)
        elif node.op == "call_function" and _stays(node.target, table):
            copies[node] = call(node.target, *args, **kwargs)
        if (copy := copies.get(node)) is None:
            return False
        if isinstance(size := node.meta.get("val"), torch.SymInt):
            sizes.setdefault(size.node.expr, copy)
    results: Any = new.output_node().args[0]
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        spec.arg.name = result.name
    new.eliminate_dead_code()
    program.graph_module.graph = new
    return True


def _call(graph: Graph, origin: Node, target: Any, *args: Any, value: Any = None, **kwargs: Any) -> Node:
    """Append a call, named as by a trace. origin: the node in the place of which it stands. value: if not origin's."""
    name = getattr(target, "overloadpacket", target).__name__
    node = graph.create_node("call_function", target, args, kwargs, name)
    node.meta = origin.meta if value is None else {**origin.meta, "val": value}
    return node


def _stays(target: Any, table: Mapping[Any, Any]) -> bool:
    """Return whether a trace that decomposes by `table` writes the operator as it is.

    An operator is decomposed if it changes an argument, or if it is composite and its result may be a view.
    """
    import torch

    if not isinstance(target, torch._ops.OpOverload):  # an item of a tuple, arithmetic of sizes
        return getattr(target, "__module__", "") == operator.getitem.__module__
    arguments, composite = target._schema.arguments, torch._C.DispatchKey.CompositeImplicitAutograd
    if target in table or target._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return False
    return not (target.has_kernel_for_dispatch_key(composite) and any(argument.alias_info for argument in arguments))


def _forms(sizes: Mapping[Any, Node]) -> dict[Any, Callable[..., Any]]:
    """Return operator -> function(call, value, *its arguments) that appends its decomposition, or returns None.

    sizes: expression of a size that is not known -> the node that computes it.
    """
    import torch

    aten = torch.ops.aten

    def batch_norm(call: Call, value: Any, x: Node, *args: Any) -> Node | None:
        *operands, training, momentum, epsilon, _ = args
        if training:
            return None
        values = value, value.new_empty(0), value.new_empty(0)
        inference = aten._native_batch_norm_legit_no_training.default
        norm = call(inference, x, *operands, momentum, epsilon, value=values)
        result, *_ = [call(operator.getitem, norm, i, value=each) for i, each in enumerate(values)]
        return result

    def shape_of(value: Any) -> list[Any]:
        return [sizes.get(size.node.expr) if isinstance(size, torch.SymInt) else size for size in value.shape]

    def chunk(call: Call, value: Any, x: Node, chunks: int, dim: int = 0) -> Node | None:
        size = x.meta["val"].shape[dim]
        return None if isinstance(size, torch.SymInt) else call(aten.split.Tensor, x, -(-size // chunks), dim)

    def contiguous(call: Call, value: Any, x: Node, memory_format: Any = torch.contiguous_format) -> Node:
        if x.meta["val"].is_contiguous(memory_format=memory_format):
            return x
        return call(aten.clone.default, x, memory_format=memory_format)

    def conv_transpose2d(call: Call, value: Any, x: Node, weight: Node, bias: Any = None, *args: Any) -> Node:
        defaults: list[Any] = [[1, 1], [0, 0], [0, 0], 1, [1, 1]]
        stride, padding, output_padding, groups, dilation = *args, *defaults[len(args) :]
        options = stride, padding, dilation, True, output_padding, groups
        return call(aten.convolution.default, x, weight, bias, *options)

    def flatten(call: Call, value: Any, x: Node, *dims: int) -> Node | None:
        return x if value.ndim == x.meta["val"].ndim else reshape(call, value, x, shape_of(value))

    def reshape(call: Call, value: Any, x: Node, shape: list[Any]) -> Node | None:
        given = x.meta["val"]
        if given.is_contiguous():
            return None if None in shape else call(aten.view.default, x, shape)
        shape = shape_of(value)
        if None in shape:
            return None
        try:
            given.view(list(value.shape))
        except (RuntimeError, ValueError):
            copy = call(aten.clone.default, x, memory_format=torch.contiguous_format, value=given.contiguous())
            return call(aten._unsafe_view.default, copy, shape)
        return call(aten.view.default, x, shape)

    def to(call: Call, value: Any, x: Node, dtype: torch.dtype, *options: Any) -> Node | None:
        if any(options):
            return None
        return x if x.meta["val"].dtype == dtype else call(aten._to_copy.default, x, dtype=dtype)

    def unflatten(call: Call, value: Any, x: Node, *args: Any) -> Node | None:
        shape = shape_of(value)
        return None if None in shape else call(aten.view.default, x, shape)

    return {
        aten.__and__.Tensor: lambda call, value, x, y: call(aten.bitwise_and.Tensor, x, y),
        aten._assert_tensor_metadata.default: lambda call, value, x, *args, **kwargs: x,  # torch.onnx.export drops it
        aten.batch_norm.default: batch_norm,
        aten.chunk.default: chunk,
        aten.contiguous.default: contiguous,
        aten.conv_transpose2d.input: conv_transpose2d,
        aten.detach_.default: lambda call, value, x: x,
        aten.dropout.default: lambda call, value, x, p, train: None if train else call(aten.clone.default, x),
        aten.flatten.using_ints: flatten,
        aten.lift_fresh_copy.default: lambda call, value, x: call(aten.clone.default, x),
        aten.numpy_T.default: lambda call, value, x: call(aten.permute.default, x, [*range(value.ndim)][::-1]),
        aten.reshape.default: reshape,
        aten.square.default: lambda call, value, x: call(aten.pow.Tensor_Scalar, x, 2),
        aten.to.dtype: to,
        aten.unflatten.int: unflatten,
    }

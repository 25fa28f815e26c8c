"""Merging of chains of Transpose and Reshape nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from evm_deploy.export.hub.moves import Movement, Size, movement
from evm_deploy.export.hub.naming import below

if TYPE_CHECKING:
    import onnx

MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


def merge_moves(model: onnx.ModelProto, blocks: Iterable[str] = ()) -> int:
    """Replace chains of nodes that only move elements by shorter chains. Returns how many nodes the graph lost.

    before:  %1 = Reshape(%0: 17 x 16, (1, 17, 16));  %2 = Transpose(%1, (0, 2, 1))
             %3 = Reshape(%2, (1, 1, 16, 17));        %4 = Transpose(%3, (0, 1, 3, 2))
    after:   %4 = Reshape(%0, (1, 1, 17, 16))

    Exact: no arithmetic. A Transpose that the graph already has is used again. Values with other readers and outputs
    of the graph stay. A chain is replaced if that leaves fewer transposes, or as many in fewer nodes. `model` must
    have the shapes of its values, and nodes without subgraphs. A size that is not known before run time may not be
    split or merged. blocks: module paths whose bounds no chain crosses, because their nodes may be fused.
    """
    return _Graph(model, tuple(blocks)).merge()


class _Graph:
    """A graph while its chains are replaced, node by node in order."""

    def __init__(self, model: onnx.ModelProto, blocks: tuple[str, ...]) -> None:
        self.graph, self.blocks = model.graph, blocks
        infos = (*self.graph.input, *self.graph.value_info, *self.graph.output)
        self.shapes = {info.name: _shape(info) for info in infos}
        self.types = {info.name: info.type.tensor_type.elem_type for info in infos}
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {value.name for value in self.graph.output}
        self.names = {node.name for node in self.graph.node}
        self.transposes: dict[tuple[str, str, tuple[int, ...]], str] = {}  # block, value, permutation -> result
        self.nodes: list[onnx.NodeProto] = []

    def merge(self) -> int:
        """Replace all chains and remove what nobody reads any more. Returns how many nodes less."""
        before = len(self.graph.node)
        for node in list(self.graph.node):
            if not (self._ends_chain(node) and self._replace(node)):
                self._append(node)
        kept = []
        for node in reversed(self.nodes):
            if node.op_type in MOVES and not self._needed(node.output[0]):
                self._unread(node)
            else:
                kept.append(node)
        written = {name for node in kept for name in node.output}
        infos = [info for info in self.graph.value_info if info.name in written]
        for field, values in ((self.graph.node, reversed(kept)), (self.graph.value_info, infos)):
            copies = list(values)
            del field[:]
            field.extend(copies)
        for i in reversed(range(len(self.graph.initializer))):
            if not self._needed(self.graph.initializer[i].name):
                del self.graph.initializer[i]
        return before - len(kept)

    def _needed(self, value: str) -> bool:
        return bool(self.readers[value]) or value in self.outputs

    def _ends_chain(self, node: onnx.NodeProto) -> bool:
        readers = self.readers[node.output[0]]
        return (
            node.op_type in MOVES
            and node.output[0] not in self.outputs
            and any(reader.op_type not in MOVES for reader in readers)
        )

    def _append(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        if node.op_type == "Transpose":
            self.transposes.setdefault((self._block(node), node.input[0], _perm(node)), node.output[0])

    def _block(self, node: onnx.NodeProto) -> str:
        """Return the path of the block that holds a node, or ""."""
        return next((path for path in self.blocks if below(path, node.name)), "")

    def _unread(self, node: onnx.NodeProto) -> None:
        """Forget that `node` reads its inputs."""
        for name in node.input:
            self.readers[name] = [reader for reader in self.readers[name] if reader is not node]

    def _replace(self, end: onnx.NodeProto) -> bool:
        """Replace the chain that ends with the node `end` by the best shorter one. Returns whether there is one."""
        chain, block = [end], self._block(end)
        while (before := self.producer.get(chain[0].input[0])) and before.op_type in MOVES:
            if self._block(before) != block:
                break
            chain.insert(0, before)
        best: tuple[tuple[int, int], str, Movement] | None = None
        for start in range(len(chain)):
            part, root = chain[start:], chain[start].input[0]
            shapes = [self.shapes.get(name) for name in (root, *(node.output[0] for node in part))]
            known = [shape for shape in shapes if shape and sum(isinstance(size, str) for size in shape) <= 1]
            if len(known) < len(shapes):
                continue
            found = movement(known, [_perm(node) if node.op_type == "Transpose" else None for node in part])
            saved = self._saved(part, root, found) if found else (0, 0)
            if found and saved > (best[0] if best else (0, 0)):
                best = saved, root, found
        if best:
            self._write(end, best[1], best[2])
        return best is not None

    def _saved(self, chain: list[onnx.NodeProto], root: str, found: Movement) -> tuple[int, int]:
        """Return how many transposes and nodes the graph loses if `found` replaces a chain."""
        gone = [chain[-1]]
        for node in reversed(chain[:-1]):
            if len(self.readers[node.output[0]]) > 1 or node.output[0] in self.outputs:
                break
            gone.append(node)
        again = (
            None if found.start or not found.perm else self.transposes.get((self._block(chain[-1]), root, found.perm))
        )
        transposes = int(found.perm is not None and (again is None or again in {node.output[0] for node in gone}))
        nodes = transposes + (found.start is not None) + found.reshape
        return sum(node.op_type == "Transpose" for node in gone) - transposes, len(gone) - nodes

    def _write(self, end: onnx.NodeProto, root: str, found: Movement) -> None:
        """Write the nodes of `found` in place of the node `end`, whose readers get the result."""
        old, value = end.output[0], root
        if found.start is not None:
            value = self._reshape(end, value, found.start)
        if found.perm is not None:
            value = self.transposes.get((self._block(end), value, found.perm)) or self._transpose(
                end, value, found.perm
            )
        if found.reshape:
            value = self._reshape(end, value, self.shapes[old] or ())
        self._unread(end)
        for reader in self.readers.pop(old):
            reader.input[:] = [value if name == old else name for name in reader.input]
            self.readers[value].append(reader)

    def _reshape(self, near: onnx.NodeProto, value: str, shape: tuple[Size, ...]) -> str:
        from onnx import numpy_helper

        name = self._name(near, "Reshape")
        sizes = np.array([-1 if isinstance(size, str) else size for size in shape], np.int64)
        self.graph.initializer.append(numpy_helper.from_array(sizes, f"{name}/shape"))
        return self._node("Reshape", name, [value, f"{name}/shape"], shape)

    def _transpose(self, near: onnx.NodeProto, value: str, perm: tuple[int, ...]) -> str:
        shape = self.shapes[value] or ()
        return self._node("Transpose", self._name(near, "Transpose"), [value], tuple(shape[i] for i in perm), perm=perm)

    def _name(self, near: onnx.NodeProto, op_type: str) -> str:
        """Return a new name for a node in the module of the node `near`."""
        stem, count = f"{near.name.rpartition('/')[0] or 'root'}/{op_type}", 0
        while (name := f"{stem}_{count}" if count else stem) in self.names:
            count += 1
        self.names.add(name)
        return name

    def _node(self, op_type: str, name: str, inputs: list[str], shape: tuple[Size, ...], **attributes: object) -> str:
        from onnx import helper

        output, kind = f"{name}/moved", self.types[inputs[0]]
        node = helper.make_node(op_type, inputs, [output], name=name, **attributes)
        self.graph.value_info.append(helper.make_tensor_value_info(output, kind, shape))
        self.shapes[output], self.types[output], self.producer[output] = shape, kind, node
        for read in inputs:
            self.readers[read].append(node)
        self._append(node)
        return output


def _perm(node: onnx.NodeProto) -> tuple[int, ...]:
    return tuple(node.attribute[0].ints)


def _shape(info: onnx.ValueInfoProto) -> tuple[Size, ...] | None:
    """Return the sizes of a value. None if a size is 0 or has no name."""
    sizes = tuple(axis.dim_value or axis.dim_param for axis in info.type.tensor_type.shape.dim)
    return sizes if all(sizes) else None

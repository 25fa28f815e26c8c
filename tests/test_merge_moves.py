"""Chains of Transpose and Reshape: the merged graph computes the same, and leaves what others read."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from evm_deploy.export.hub.merge_moves import merge_moves
from evm_deploy.export.hub.moves import Movement, movement


def model(shape, *nodes, outputs=("y",)):
    """Return a model of nodes (op type, inputs, output, list) with all shapes. list: permutation, shape or axes."""
    made, constants = [], []
    for op_type, inputs, output, numbers in nodes:
        attributes, inputs = {}, list(inputs)
        if op_type == "Transpose":
            attributes["perm"] = numbers
        elif numbers is not None:
            constants.append(numpy_helper.from_array(np.array(numbers, np.int64), f"{output}/numbers"))
            inputs.append(f"{output}/numbers")
        made.append(helper.make_node(op_type, inputs, [output], name=f"layer.{output}/{op_type}", **attributes))
    graph = helper.make_graph(
        made,
        "moves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)


def run(proto, x):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, {"x": x})


def merged(proto, batch=3):
    """Merge, check that the model is valid and its outputs keep their bits; return the kinds of nodes that are left."""
    sizes = [axis.dim_value or batch for axis in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(sizes).astype(np.float32)
    want, before = run(proto, x), len(proto.graph.node)
    assert merge_moves(proto) == before - len(proto.graph.node)
    onnx.checker.check_model(proto, full_check=True)
    for have, wanted in zip(run(proto, x), want, strict=True):
        np.testing.assert_array_equal(have, wanted)
    assert len({node.name for node in proto.graph.node}) == len(proto.graph.node)
    read = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= read
    return Counter(node.op_type for node in proto.graph.node)


RELU = ("Relu", ["m"], "y", None)


@pytest.mark.parametrize(
    ("shape", "nodes", "left"),
    [
        ((17, 16), [("Reshape", "x", "a", [1, 17, 16]), ("Transpose", "a", "b", [0, 2, 1]),
                    ("Reshape", "b", "c", [1, 1, 16, 17]), ("Transpose", "c", "m", [0, 1, 3, 2])], ["Reshape"]),
        ((2, 3, 4, 5), [("Transpose", "x", "a", [0, 2, 3, 1]), ("Transpose", "a", "m", [0, 3, 1, 2])], []),
        ((2, 3, 4, 5), [("Transpose", "x", "a", [0, 2, 3, 1]), ("Transpose", "a", "m", [0, 2, 1, 3])], ["Transpose"]),
        ((6, 17), [("Transpose", "x", "a", [1, 0]), ("Reshape", "a", "b", [17, 1, 6]),
                   ("Transpose", "b", "m", [1, 0, 2])], ["Transpose", "Reshape"]),
        ((2, 12), [("Reshape", "x", "a", [2, 3, 4]), ("Reshape", "a", "b", [6, 4]), ("Transpose", "b", "m", [1, 0])],
         ["Reshape", "Transpose"]),
        ((2, 12), [("Unsqueeze", "x", "a", [1]), ("Squeeze", "a", "b", [1]), ("Transpose", "b", "m", [1, 0])],
         ["Transpose"]),
        (("batch", 3, 4, 5), [("Reshape", "x", "a", [0, 3, 20]), ("Transpose", "a", "b", [0, 2, 1]),
                              ("Reshape", "b", "c", [0, 4, 5, 3]), ("Transpose", "c", "m", [0, 3, 1, 2])], []),
        (("batch", 6, 5), [("Reshape", "x", "a", [0, 2, 3, 5]), ("Transpose", "a", "b", [0, 1, 3, 2]),
                           ("Unsqueeze", "b", "m", [1])], ["Reshape", "Transpose"]),
    ],
)  # fmt: skip
def test_chains_become_shorter(shape, nodes, left):
    assert merged(model(shape, *nodes, RELU)) == Counter([*left, "Relu"])


def test_an_inner_value_with_another_reader_stays():
    nodes = [("Transpose", "x", "a", [1, 0]), ("Transpose", "a", "m", [1, 0]), RELU, ("Relu", "a", "z", None)]
    assert merged(model((3, 4), *nodes, outputs=("y", "z"))) == Counter(["Transpose", "Relu", "Relu"])


def test_an_output_of_the_graph_stays():
    nodes = [("Transpose", "x", "a", [1, 0]), ("Transpose", "a", "m", [1, 0]), RELU]
    proto = model((3, 4), *nodes, outputs=("y", "a", "m"))
    assert merged(proto) == Counter(["Transpose", "Transpose", "Relu"])
    assert [value.name for value in proto.graph.output] == ["y", "a", "m"]


def test_no_longer_chain_is_made_for_a_value_that_stays():
    """The chain from x needs as many nodes as it saves, because `b` is read elsewhere."""
    nodes = [("Transpose", "x", "a", [0, 2, 1]), ("Reshape", "a", "b", [4, 2, 3]), ("Transpose", "b", "m", [1, 0, 2])]
    proto = model((2, 3, 4), *nodes, RELU, ("Relu", "b", "z", None), outputs=("y", "z"))
    before = proto.SerializeToString()
    merged(proto)
    assert proto.SerializeToString() == before


def test_a_transpose_is_used_again():
    nodes = [
        ("Transpose", "x", "a", [0, 2, 1]), ("Relu", "a", "y", None),
        ("Reshape", "x", "b", [1, 1, 6, 5]), ("Transpose", "b", "c", [0, 1, 3, 2]), ("Relu", "c", "z", None),
    ]  # fmt: skip
    proto = model((1, 6, 5), *nodes, outputs=("y", "z"))
    assert merged(proto) == Counter(["Transpose", "Reshape", "Relu", "Relu"])
    assert {node.name.rpartition("/")[0] for node in proto.graph.node} == {"layer.a", "layer.y", "layer.c", "layer.z"}


def test_no_chain_crosses_the_bounds_of_a_block():
    """A Transpose outside and its inverse in a block, whose nodes may become one node with one input."""
    nodes = [("Transpose", "x", "a", [1, 0]), ("Transpose", "a", "m", [1, 0]), RELU, ("Relu", "a", "z", None)]
    proto = model((3, 4), *nodes, outputs=("y", "z"))
    assert merge_moves(proto, ["layer.m"]) == 0
    assert merge_moves(proto, ["layer.other", "layer.z"]) == 1


@pytest.mark.parametrize(
    "nodes",
    [
        [("Transpose", "x", "a", [0, 2, 1]), ("Reshape", "a", "m", [-1, 3])],  # merges an unknown size
        [("Transpose", "x", "m", [0, 2, 1])],
        [("Transpose", "x", "a", [0, 2, 1]), ("Relu", "a", "b", None), ("Transpose", "b", "m", [0, 2, 1])],
    ],
)
def test_nothing_to_merge(nodes):
    proto = model(("batch", 3, 4), *nodes, RELU)
    before = proto.SerializeToString()
    merged(proto)
    assert proto.SerializeToString() == before


def test_shapes_that_are_not_known_are_left_alone():
    proto = model((3, 4), ("Transpose", "x", "a", [1, 0]), ("Transpose", "a", "m", [1, 0]), RELU)
    del proto.graph.value_info[:]
    assert merged(proto) == Counter(["Transpose", "Transpose", "Relu"])


def test_a_constant_that_others_read_stays():
    proto = model((1, 6), ("Reshape", "x", "a", [6, 1]), ("Reshape", "a", "m", [2, 3]), RELU, ("Relu", "x", "z", None))
    proto.graph.node[3].CopyFrom(helper.make_node("Cast", ["a/numbers"], ["z"], name="z/Cast", to=TensorProto.FLOAT))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2]))
    assert merged(proto) == Counter(["Reshape", "Relu", "Cast"])


def test_random_chains():
    """Any chain, against numpy."""
    g = np.random.default_rng(0)
    shortest = 0
    for _ in range(500):
        first = [int(size) for size in g.choice([1, 2, 3, 4, 6], g.integers(1, 5))]
        x = np.arange(np.prod(first)).reshape(first)
        shapes, perms, value = [first], [], x
        for _ in range(g.integers(1, 6)):
            if g.random() < 0.5:
                perms.append(tuple(int(i) for i in g.permutation(value.ndim)))
                value = value.transpose(perms[-1])
            else:
                perms.append(None)
                value = value.reshape(regrouped(g, value.size))
            shapes.append(list(value.shape))
        found = movement(shapes, perms)
        if found is None:
            continue
        have = x if found.start is None else x.reshape(found.start)
        have = have if found.perm is None else have.transpose(found.perm)
        have = have.reshape(value.shape) if found.reshape else have
        np.testing.assert_array_equal(have, value)
        assert have.shape == value.shape
        shortest += found == Movement()
    assert shortest > 5


def regrouped(g, size):
    """Return a random shape of `size` elements."""
    shape = []
    while size > 1:
        divisors = [d for d in range(2, size + 1) if size % d == 0]
        shape.append(int(g.choice(divisors)))
        size //= shape[-1]
    return [*shape, *[1] * int(g.integers(0, 3))]

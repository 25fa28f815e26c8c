"""Tests of `litert` alone: rules for operators, orders of axes, the file, its metadata, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import cli, load
from evm_deploy.calib.histogram import Range
from evm_deploy.calib.layers import activations, quantizable_layers
from evm_deploy.calib.quantize import insert_qdq
from evm_deploy.demo import CHECKPOINT
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export import ExportPlan, export, litert
from evm_deploy.export.litert import flatbuffer, layout, metadata
from evm_deploy.export.target import check_plan
from evm_deploy.runtimes import litert as runtime
from evm_deploy.runtimes.base import RunOptions
from tests.toolchains import need

need("LiteRT", module=True)

RNG = np.random.default_rng(0)
SHAPE = (2, 4, 6, 8)  # no two sizes are equal: an axis in the wrong place does not fit


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def node(op, *constants, shape=SHAPE, dtype=np.float32, first=False, outputs=1, opset=20, **attributes):
    """One node that reads x and constants; None leaves an input out. first: x is its second input."""
    names = [None if value is None else f"c{i}" for i, value in enumerate(constants)]
    reads = [name or "" for name in names]
    reads.insert(1 if first else 0, "x")
    made = helper.make_node(op, reads, [f"y{i}" for i in range(outputs)], name=f"n/{op}", **attributes)
    stored = [numpy_helper.from_array(np.asarray(v), n) for v, n in zip(constants, names, strict=True) if n]
    return [made], stored, shape, dtype, opset


def moved(given):
    """The same node behind a Transpose: LiteRT finds x in another order of axes."""
    nodes, stored, shape, dtype, opset = given
    perm = [*range(1, len(shape)), 0]
    before = [shape[perm.index(axis)] for axis in range(len(shape))]
    nodes[0].input[:] = ["t" if name == "x" else name for name in nodes[0].input]
    return [helper.make_node("Transpose", ["x"], ["t"], perm=perm), *nodes], stored, before, dtype, opset


def model_of(given):
    nodes, stored, shape, dtype, opset = given
    x = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name=name) for name in nodes[-1].output], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)


def in_litert(model, x, **options):
    found = litert.translated(onnx.ModelProto.FromString(model.SerializeToString()), **options)
    data = found.file.finish(found.inputs, found.outputs, "test", {})
    with runtime.LiteRt(data) as opened:
        return opened.run({"x": x}), found


def in_onnxruntime(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, {"x": x}), strict=True))


def squared(op):
    """An operator that takes no negative numbers."""
    return [helper.make_node("Mul", ["x", "x"], ["s"]), helper.make_node(op, ["s"], ["y0"])], [], SHAPE, np.float32, 20


IMAGE = (1, 6, 9, 7)


def resized(mode, places, **more):
    sizes = np.int64([1, 6, 18, 14])
    return node("Resize", None, None, sizes, shape=IMAGE, mode=mode, coordinate_transformation_mode=places, **more)


CASES = {
    **{op: node(op) for op in ("Abs", "Ceil", "Cos", "Exp", "Floor", "Neg", "Relu", "Round", "Sigmoid", "Sin", "Tanh")},
    **{op: node(op) for op in ("Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "LogSoftmax", "Softmax")},
    "Softplus": node("Softplus"),
    "Erf": node("Erf"),
    "Gelu tanh": node("Gelu", approximate="tanh"),
    "Log": squared("Log"),
    "Sqrt": squared("Sqrt"),
    "Add row": node("Add", numbers(8)),
    "Add scalar": node("Add", np.float32(2)),
    "Add more axes": node("Add", numbers(1, 3, 4, 6), shape=(4, 6)),
    "Add one with more axes": node("Add", numbers(1, 1, 1), shape=(8,)),
    "Sub from constant": node("Sub", numbers(4, 1, 8), first=True),
    "Mul column": node("Mul", numbers(4, 6, 1)),
    "Div": node("Div", 2 + np.abs(numbers(4, 1, 1))),
    "Mod": node("Mod", np.int32([3]), dtype=np.int32, shape=(5, 4)),
    "Pow": node("Pow", np.float32(2)),
    "Reciprocal": node("Reciprocal"),
    "Max of three": node("Max", numbers(6, 8), numbers(4, 1, 1)),
    "Min": node("Min", np.float32(0.3)),
    "Sum of three": node("Sum", numbers(8), numbers(6, 8)),
    "Clip": node("Clip", np.float32(-0.3), np.float32(0.4)),
    "Clip to 6": node("Clip", np.float32(0), np.float32(6)),
    "Clip above": node("Clip", None, np.float32(0.4)),
    "Cast": node("Cast", dtype=np.uint8, to=TensorProto.FLOAT),
    "Cast to int64": node("Cast", to=TensorProto.INT64),
    "Greater": node("Greater", np.float32(0)),
    "Where": node("Where", RNG.random((4, 1, 8)) > 0.5, numbers(4, 6, 1), first=True),
    "Transpose": node("Transpose", perm=[0, 2, 3, 1]),
    "Reshape splits": node("Reshape", np.int64([2, 4, 3, 2, 8])),
    "Reshape mixes": node("Reshape", np.int64([3, 16, 8])),
    "Reshape of ones": node("Reshape", np.int64([1, 4, 1, 6, 8, 2])),
    "Flatten": node("Flatten", axis=2),
    "Unsqueeze": node("Unsqueeze", np.int64([1, 3])),
    "Squeeze": node("Squeeze", np.int64([1]), shape=(4, 1, 6)),
    "Expand": node("Expand", np.int64([3, 4, 6, 8]), shape=(4, 1, 8)),
    "Tile": node("Tile", np.int64([1, 2, 1, 3])),
    "Concat": node("Concat", numbers(2, 4, 3, 8), axis=-2),
    "Split equal": node("Split", outputs=3, axis=2, num_outputs=3),
    "Split unequal": node("Split", np.int64([1, 3]), outputs=2, axis=1),
    "Slice": node("Slice", np.int64([1, -3]), np.int64([6, 9999]), np.int64([2, 3])),
    "Slice by steps": node("Slice", np.int64([1]), np.int64([8]), np.int64([3]), np.int64([3])),
    "Slice backwards": node("Slice", np.int64([-1]), np.int64([-9999]), np.int64([2]), np.int64([-1])),
    "Slice backwards by steps": node("Slice", np.int64([6]), np.int64([0]), np.int64([3]), np.int64([-2])),
    "Gather one": node("Gather", np.int64(-2), axis=2),
    "Gather one as list": node("Gather", np.int64([1]), axis=1),
    "Gather several": node("Gather", np.int64([[3, 0], [-1, 2]]), axis=1),
    "Gather from constant": node("Gather", numbers(20, 3), first=True, dtype=np.int32, shape=(2, 4)),
    "GatherElements": node("GatherElements", np.int64(RNG.integers(-4, 4, (2, 3, 6, 8))), axis=1),
    "GatherND": node("GatherND", np.int64(RNG.integers(0, 2, (3, 2)))),
    "Pad": node("Pad", np.int64([0, 1, 0, 2, 0, 0, 3, 0])),
    "Pad by 5": node("Pad", np.int64([1, 2]), np.float32(5), np.int64([-1])),
    "Pad by reflection": node("Pad", np.int64([0, 0, 1, 2, 0, 0, 3, 1]), mode="reflect"),
    "ReduceMean": node("ReduceMean", np.int64([1, -1])),
    "ReduceMean without axes": node("ReduceMean", keepdims=0),
    "ReduceSum": node("ReduceSum", np.int64([2]), keepdims=0),
    "ReduceMax": node("ReduceMax", np.int64([1]), keepdims=0),
    "ReduceMin": node("ReduceMin", np.int64([0, 3])),
    "Softmax over channels": node("Softmax", axis=1),
    "ArgMax": node("ArgMax", axis=1, keepdims=0),
    "ArgMin": node("ArgMin", axis=2),
    "TopK": node("TopK", np.int64([3]), outputs=2, axis=2),
    "CumSum": node("CumSum", np.int64(1), exclusive=1, reverse=1),
    "MatMul": node("MatMul", numbers(8, 5)),
    "MatMul by matrices": node("MatMul", numbers(4, 8, 5)),
    "MatMul of constant": node("MatMul", numbers(5, 6), first=True),
    "Gemm": node("Gemm", numbers(5, 8), numbers(5), shape=(3, 8), transB=1, alpha=0.5, beta=2.0),
    "Gemm plain": node("Gemm", numbers(8, 5), shape=(3, 8)),
    "Einsum": node("Einsum", numbers(5, 4), equation="bgrl,dg->brdl"),
    "Einsum with batch": node("Einsum", numbers(4, 5, 6), equation="bkdl,kcd->bkcl"),
    "LayerNormalization": node("LayerNormalization", numbers(8), numbers(8), epsilon=1e-6),
    "LayerNormalization without shift": node("LayerNormalization", numbers(8)),
    "InstanceNormalization": node("InstanceNormalization", numbers(4), numbers(4)),
    "BatchNormalization": node("BatchNormalization", numbers(4), numbers(4), numbers(4), np.abs(numbers(4)) + 1),
    "Conv": node("Conv", numbers(5, 6, 3, 3), numbers(5), shape=IMAGE, pads=[1, 1, 1, 1]),
    "Conv strided": node("Conv", numbers(5, 6, 3, 3), shape=IMAGE, pads=[1, 1, 1, 1], strides=[2, 2]),
    "Conv uneven": node("Conv", numbers(5, 6, 3, 2), shape=IMAGE, pads=[0, 1, 2, 0], strides=[2, 1]),
    "Conv dilated": node("Conv", numbers(5, 6, 3, 3), shape=IMAGE, dilations=[2, 2], pads=[2, 2, 2, 2]),
    "Conv grouped": node("Conv", numbers(4, 3, 3, 3), numbers(4), shape=IMAGE, group=2),
    "Conv depthwise": node("Conv", numbers(12, 1, 3, 3), numbers(12), shape=IMAGE, group=6, pads=[1, 1, 1, 1]),
    "Conv SAME": node("Conv", numbers(5, 6, 2, 3), shape=IMAGE, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv of a line": node("Conv", numbers(5, 6, 3), numbers(5), shape=(2, 6, 9), pads=[2, 0]),
    "ConvTranspose": node("ConvTranspose", numbers(6, 5, 4, 4), numbers(5), shape=IMAGE, strides=[2, 2], pads=[1] * 4),
    "ConvTranspose of a line": node("ConvTranspose", numbers(6, 5, 2), shape=(2, 6, 9), strides=[2]),
    "MaxPool": node("MaxPool", shape=IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "MaxPool plain": node("MaxPool", shape=IMAGE, kernel_shape=[2, 2], strides=[2, 2]),
    "AveragePool": node("AveragePool", shape=IMAGE, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "AveragePool counted": node("AveragePool", shape=IMAGE, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    "GlobalAveragePool": node("GlobalAveragePool", shape=IMAGE),
    "Resize half_pixel": resized("linear", "half_pixel"),
    "Resize align_corners": resized("linear", "align_corners"),
    "Resize asymmetric": resized("linear", "asymmetric"),
    "Resize nearest": resized("nearest", "asymmetric", nearest_mode="floor"),
    "Resize nearest half_pixel": resized("nearest", "half_pixel"),
    "Resize smaller": node("Resize", None, None, np.int64([1, 6, 4, 5]), shape=IMAGE, mode="linear"),
}


def x_of(model):
    """Values of both signs, away from numbers that end in .5; indices that fit every axis."""
    kind = model.graph.input[0].type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if dtype == np.float32:
        return numbers(*shape)
    return RNG.integers(0, 20, shape).astype(dtype)


@pytest.mark.parametrize("behind_a_transpose", [False, True], ids=["", "moved"])
@pytest.mark.parametrize("case", CASES)
def test_an_operator_computes_what_onnx_runtime_computes(case, behind_a_transpose):
    nodes, *rest = CASES[case]
    given = ([onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes], *rest)
    model = model_of(moved(given) if behind_a_transpose else given)
    x = x_of(model)
    want, (have, _) = in_onnxruntime(model, x), in_litert(model, x)
    assert list(have) == list(want)
    for name, value in want.items():
        wanted = value.astype(np.int32) if value.dtype == np.int64 else value
        assert (have[name].shape, have[name].dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(have[name], wanted, rtol=2e-5, atol=1e-5)


def test_every_rule_has_a_case():
    tested = {each.op_type for nodes, *_ in CASES.values() for each in nodes}
    assert set(litert.RULES) - tested == {
        *("And", "Equal", "GreaterOrEqual", "GroupNormalization", "Less", "LessOrEqual", "Not", "Or"),
        *("DequantizeLinear", "QuantizeLinear", "RMSNormalization"),
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (node("Det", shape=(3, 3)), "evm-deploy has no rule for this operator"),
        (node("Conv", numbers(2, 4, 1, 1, 1), shape=(1, 4, 3, 3, 3)), "3 spatial axes; it has one or two"),
        (node("Pad", np.int64([0, -1, 0, 0, 0, 0, 0, 0])), "negative padding"),
        (node("TopK", np.int64([2]), outputs=2, largest=0), "the smallest values"),
        (node("Resize", None, None, np.int64([1, 6, 18, 14]), shape=IMAGE, mode="cubic"), "mode cubic"),
        (node("MaxPool", shape=IMAGE, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), "ceil_mode"),
        (node("LayerNormalization", numbers(6, 8), axis=2), "more than the last axis"),
        (node("Einsum", numbers(4, 5), equation="abcd,be->ace"), "equation .*: an axis of one input alone"),
    ],
)
def test_what_has_no_translation_is_named(given, said):
    with pytest.raises(UsageError, match=rf"LiteRT: n/\w+ \(\w+\) cannot be translated: {said}(?s:.*)--target onnx"):
        litert.translated(model_of(given))


def test_an_operand_that_depends_on_the_image_is_refused_where_it_must_be_constant():
    nodes = [helper.make_node("Conv", ["x", "x"], ["y"], name="n/Conv")]
    with pytest.raises(UsageError, match="input 1 depends on the image"):
        litert.translated(model_of((nodes, [], (3, 3, 1, 1), np.float32, 20)))


def test_a_transpose_and_a_convolution_cost_one_operator_each():
    """The file has channels last: a network of NCHW and of NHWC gives the same operators."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Transpose", ["r"], ["y"], perm=[0, 2, 3, 1]),
    ]
    model = model_of((nodes, [numpy_helper.from_array(numbers(5, 3, 1, 1), "w")], (1, 6, 8, 3), np.float32, 20))
    have, found = in_litert(model, x := numbers(1, 6, 8, 3))
    assert found.file.count == 2
    np.testing.assert_allclose(have["y"], in_onnxruntime(model, x)["y"], atol=1e-5)


@given(st.data())
def test_a_reshape_of_a_permuted_tensor_has_the_right_values(data):
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5))
    order = tuple(data.draw(st.permutations(range(len(sizes)))))
    left = int(np.prod(sizes))
    after = []
    while left > 1:
        after.append(data.draw(st.sampled_from([n for n in range(2, left + 1) if left % n == 0])))
        left //= after[-1]
    after.insert(data.draw(st.integers(0, len(after))), 1)
    value = np.arange(np.prod(sizes)).reshape(sizes)
    tensor = value.transpose(order)
    new = layout.reshaped(sizes, after, order)
    if order == layout.identity(len(sizes)):
        assert new is not None
    if new is not None:
        have = tensor.reshape(layout.permuted(after, new)).transpose(np.argsort(new))
        np.testing.assert_array_equal(have, value.reshape(after))


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_orders_of_axes(one, other):
    value = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    tensor = value.transpose(one)
    np.testing.assert_array_equal(tensor.transpose(layout.moves(tuple(one), tuple(other))), value.transpose(other))
    new = layout.transposed(tuple(one), other)
    np.testing.assert_array_equal(tensor.transpose(np.argsort(new)), value.transpose(other))
    assert layout.same_data(SHAPE, tuple(one), tuple(other)) == (one == other)
    assert layout.same_data((1, 1, 3, 1), (0, 1, 2, 3), (3, 2, 1, 0))


def test_half_weights_are_float16_in_the_file():
    model = model_of(CASES["Conv"])
    want, (have, found) = in_onnxruntime(model, x := x_of(model)), in_litert(model, x, half=True)
    assert np.abs(have["y0"] - want["y0"]).max() < 2e-2
    kinds = Counter(found.file.dtypes)
    assert kinds["float16"] == 1 and [len(data) for data in found.file._buffers if len(data) == 2 * 5 * 6 * 9]


def test_constants_are_aligned_and_the_bytes_repeat():
    data = [np.arange(n, dtype=np.uint8) for n in (1, 3, 17, 40)]

    def made():
        file = flatbuffer.FlatBuffer({})
        x = file.tensor("x", (1,), "uint8")
        y = file.tensor("x", (1,), "uint8")
        for each in data:
            file.constant(each)
        assert file.constant(data[0].copy()) == file.constant(data[0])
        file.operator("ABS", [x], [y])
        return file.finish({"x": x}, {"y": y}, "test", {"more": b"abc"})

    packed = made()
    assert packed == made() and packed[4:8] == b"TFL3"
    for each in data[2:]:
        assert packed.index(each.tobytes()) % flatbuffer.ALIGNMENT == 0
    model = flatbuffer.read(packed)
    assert [tensor.name for tensor in model.subgraphs[0].tensors[:2]] == [b"x", b"x;1"]
    assert flatbuffer.pack(model) == flatbuffer.pack(flatbuffer.read(flatbuffer.pack(model)))
    with pytest.raises(ValueError, match="Conv2DOptions has no field strides"):
        flatbuffer.FlatBuffer({}).operator("CONV_2D", [0], [1], strides=1)


def test_the_operators_behind_a_tensor():
    file = flatbuffer.FlatBuffer({})
    a, b, c, d = (file.tensor(name, (1,), "float32") for name in "abcd")
    for read, written in ((a, b), (b, c), (a, d)):
        file.operator("ABS", [read], [written])
    found = flatbuffer.behind(file._operators, [c], [b])
    assert [each.outputs for each in found] == [[c]]
    assert [each.outputs for each in flatbuffer.behind(file._operators, [c], [a])] == [[b], [c]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return export(CHECKPOINT, ExportPlan("litert", batch=2, head="probs"), tmp_path_factory.mktemp("digits"))


def test_a_bundle_of_two_images_runs_and_tests_itself(digits):
    assert digits.manifest.parity["max_abs"] < 1e-5
    with load(digits.path) as model:
        assert model.inputs["image"].shape == (2, 64, 64, 3) and model.outputs["probs"].shape == (2, 10)
        assert all(check.ok for check in model.selftest())
        pixels = RNG.integers(0, 256, (2, 64, 64, 3), np.uint8)
        two = model.run({"image": pixels})["probs"]
        swapped = model.run({"image": pixels[::-1].copy()})["probs"]
        np.testing.assert_allclose(two[::-1], swapped, atol=1e-6)


def test_the_file_has_metadata_and_labels_for_tensorflows_libraries(digits):
    """Read by field numbers of metadata_schema.fbs, as its generated classes do."""
    from flatbuffers import number_types
    from flatbuffers.table import Table

    data = (digits.path / "model.tflite").read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["labels.txt"]
        assert archive.read("labels.txt").decode().split() == [str(n) for n in range(10)]
        assert archive.infolist()[0].compress_type == zipfile.ZIP_STORED
    model = flatbuffer.read(data)
    buffers = {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}
    facts = json.loads(buffers["evm_deploy"])
    assert facts["model"] == "evm_digits" and facts["head"] == "probs"
    described = buffers[metadata.METADATA]
    assert described[4:8] == b"M001"

    def field(table, number):
        return number_types.UOffsetTFlags.py_type(table.Offset(4 + 2 * number))

    def child(table, number):
        return Table(table.Bytes, table.Indirect(table.Pos + field(table, number)))

    def text(table, number):
        return table.String(table.Pos + field(table, number)).decode()

    def items(table, number):
        start, count = table.Vector(field(table, number)), table.VectorLen(field(table, number))
        return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(count)]

    def number(table, place, flags):
        return table.Get(flags, table.Pos + field(table, place))

    root = Table(described, int.from_bytes(described[:4], "little"))
    assert text(root, 0) == "evm_digits" and "EfficientVMamba" in text(root, 1) and text(root, 7) == "1.0.0"
    (graph,) = items(root, 3)
    (image,), (probs,) = items(graph, 2), items(graph, 3)
    assert (text(image, 0), text(probs, 0)) == ("image", "probs")
    content = child(image, 3)
    assert number(content, 0, number_types.Uint8Flags) == 2  # ImageProperties
    properties = child(content, 1)
    assert number(properties, 0, number_types.Int8Flags) == 1  # RGB
    size = child(properties, 1)
    assert [number(size, place, number_types.Uint32Flags) for place in (0, 1)] == [64, 64]
    (labels,) = items(probs, 6)
    assert text(labels, 0) == "labels.txt" and number(labels, 2, number_types.Int8Flags) == 2  # TENSOR_AXIS_LABELS


def test_the_bundle_runs_where_only_the_runtime_is_installed(digits):
    """The self-test in a process without torch, onnx, ONNX Runtime and the rest of the toolchain."""
    blocked = ("torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "openvino", "coremltools")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from evm_deploy.cli import run_main\n"
        f"raise SystemExit(run_main([{str(digits.path)!r}, '--selftest']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "PASSED" in done.stdout + done.stderr, done.stderr


def test_the_readme_of_the_bundle_can_be_run(digits):
    text = (digits.path / "README.md").read_text(encoding="utf-8")
    code = next(part for part in text.split("```python\n") if "Interpreter" in part).split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code + "print(outputs.shape)"], capture_output=True, text=True, cwd=digits.path
    )
    assert done.stdout.strip() == "(2, 10)", done.stderr


def test_plans_that_a_file_cannot_have():
    for batch in ("dynamic", "1:2:4"):
        with pytest.raises(UsageError, match="static shapes, and --batch"):
            check_plan(litert.TARGET, ExportPlan("litert", batch=batch))
    with pytest.raises(UsageError, match="has no scan lowering 'plugin'; it has: auto, portable"):
        check_plan(litert.TARGET, ExportPlan("litert", scan="plugin"))


def test_without_litert_the_commands_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ToolchainError, match=r"ai-edge-litert is not installed\n  pip install .*\[run-litert\]"):
        runtime.LiteRt(tmp_path / "model.tflite")
    missing = {name: "1" for name in litert.TARGET.packages if name != runtime.MODULE}
    monkeypatch.setattr("evm_deploy.export.target.package_versions", lambda names: missing)
    assert cli.export_main(["--target", "tflite", "-q", "-o", str(tmp_path)]) == 3
    assert "packages are missing" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.tflite"
    for content in (b"", b"no model", b"\x1c\x00\x00\x00TFL3" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"LiteRT cannot open model\.tflite: "):
            runtime.LiteRt(path)
    with pytest.raises(BundleError, match="LiteRT cannot open"):
        runtime.LiteRt(Path(tmp_path / "none.tflite"), RunOptions(threads=2))


def layers_of_every_kind():
    """Convolutions with and without ReLU, a depthwise one, a gate, a residual, products of channels last: float32."""
    g, constants, nodes = np.random.default_rng(0), [], []

    def add(op, *inputs, name="", **attributes):
        name = name or f"m{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [f"{name}/{op}"], name=f"{name}/{op}", **attributes))
        return nodes[-1].output[0]

    def constant(name, value):
        constants.append(numpy_helper.from_array(value, name))
        return name

    def layer(op, x, shape, fan, *, bias=True, **attributes):
        name = f"layer{len(nodes)}"
        inputs = [x, constant(f"{name}.weight", (g.standard_normal(shape) / fan**0.5).astype(np.float32))]
        if bias:
            count = shape[0] if op == "Conv" else shape[1]
            inputs.append(constant(f"{name}.bias", g.standard_normal(count).astype(np.float32)))
        return add(op, *inputs, name=name, **attributes)

    x = add("Relu", layer("Conv", "x", (16, 3, 3, 3), 27, pads=[1] * 4, strides=[2, 2]))
    x = add("Relu", layer("Conv", x, (16, 1, 3, 3), 9, pads=[1] * 4, group=16))
    pooled = add("ReduceMean", x, constant("axes", np.int64([-2, -1])), keepdims=1)
    hidden = add("Relu", layer("Conv", pooled, (4, 16, 1, 1), 16))
    gate = add("Sigmoid", layer("Conv", hidden, (16, 4, 1, 1), 4))
    y = layer("Conv", add("Mul", x, gate), (16, 16, 1, 1), 16)
    rows = add("Transpose", add("Add", y, x), perm=[0, 2, 3, 1])
    rows = layer("MatMul", rows, (16, 12), 16, bias=False)
    line = add("ReduceMean", add("Gelu", rows), constant("both", np.int64([1, 2])), keepdims=0)
    nodes[-1].output[0] = "features"
    layer("Gemm", "features", (12, 10), 12)
    nodes[-1].output[0] = "y"
    assert line
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 9, 7])
    graph = helper.make_graph(nodes, "g", [image], [onnx.ValueInfoProto(name="y")], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def test_layers_between_q_and_dq_are_int8_and_nothing_else_is_in_their_place():
    """The same integers as ONNX Runtime's, up to the rounding of a tie; ReLU is part of a layer or of nothing."""
    model, x = layers_of_every_kind(), numbers(2, 3, 9, 7)
    found = quantizable_layers(model)
    names = activations(found)
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "y")
    values = in_onnxruntime(probed, x)
    ranges = {key: Range(min(0, values[name].min()), values[name].max()) for name, key in names.items()}
    rounded = insert_qdq(model, found, ranges, rounded_outputs=True)
    want, exact = in_onnxruntime(rounded, x)["y"], values["y"]
    outputs, translation = in_litert(rounded, x)
    step = float(np.ptp(values["y"]) / 255)
    assert np.abs(outputs["y"] - want).max() <= 2 * step and np.abs(outputs["y"] - exact).max() < 0.1
    file = translation.file
    codes = {index: code for (code, _), index in file._codes.items()}
    kinds = Counter((codes[each.opcodeIndex], file.dtypes[each.outputs[0]]) for each in file._operators)
    layers = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 2, "MEAN": 1, "MUL": 1}
    assert {code: kinds[code, "int8"] for code in layers} == layers
    assert not any(kinds[code, "float32"] for code in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MUL"))
    assert not any(code == "RELU" for code, _ in kinds)
    weights = [i for i, dtype in enumerate(file.dtypes) if dtype == "int8" and len(file.scales[i].scale) > 1]
    assert len(weights) == 7
    for index in weights:
        assert file.shapes[index][file.scales[index].axis] == file.scales[index].scale.size


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_two_rounded_values_meet_in_int8(op):
    nodes, constants = [], []
    for name, value in {
        "s0": np.float32(0.02),
        "s1": np.float32(0.04),
        "s2": np.float32(0.05),
        "z": np.uint8(120),
    }.items():
        constants.append(numpy_helper.from_array(value, name))

    def pair(x, scale, y):
        nodes.append(helper.make_node("QuantizeLinear", [x, scale, "z"], [f"{y}q"], name=f"{y}/Q"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{y}q", scale, "z"], [y], name=f"{y}/DQ"))

    nodes.append(helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]))
    pair("x", "s0", "a")
    pair("t", "s1", "b")
    nodes.append(helper.make_node(op, ["a", "b"], ["c"], name=f"n/{op}"))
    pair("c", "s2", "y")
    model, x = model_of((nodes, constants, (1, 3, 5, 5), np.float32, 20)), numbers(1, 3, 5, 5)
    have, found = in_litert(model, x)
    codes = {index: code for (code, _), index in found.file._codes.items()}
    kinds = {(codes[each.opcodeIndex], found.file.dtypes[each.outputs[0]]) for each in found.file._operators}
    assert (op.upper(), "int8") in kinds and not any(kind == (op.upper(), "float32") for kind in kinds)
    assert np.abs(have["y"] - in_onnxruntime(model, x)["y"]).max() < 1.01 * 0.05


def test_pairs_that_litert_does_not_know_are_refused():
    scale, zero = np.float32([1, 2, 3, 4]), np.zeros(4, np.uint8)
    with pytest.raises(UsageError, match="its scale is not one of int8 or uint8"):
        litert.translated(model_of(node("QuantizeLinear", scale, zero, axis=1)))
    with pytest.raises(UsageError, match="its scale is not one of int8 or uint8"):
        litert.translated(model_of(node("QuantizeLinear", np.float32(1), np.uint16(0), opset=21)))


def test_rounded_values_come_back():
    """A pair alone: the same rounding as ONNX Runtime's, ends of the range included."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.float32(0.03), "s"), numpy_helper.from_array(np.uint8(100), "z")]
    model = model_of((nodes, constants, (4, 50), np.float32, 20))
    x = 3 * numbers(4, 50)
    have, _ = in_litert(model, x)
    np.testing.assert_allclose(have["y"], in_onnxruntime(model, x)["y"], atol=0.03 * 1e-3)


@pytest.mark.slow
def test_int8_of_the_digits(tmp_path):
    plan = ExportPlan("litert", "int8", calib="demo", calib_images=100, val="demo", smooth="off", calib_method="minmax")
    bundle = export(CHECKPOINT, plan, tmp_path)
    accuracy, facts = bundle.manifest.accuracy, bundle.manifest.details["quantization"]
    assert accuracy["ok"] and accuracy["top1"] > 0.985 and accuracy["sqnr_db"] > 25
    assert facts["size_of_fp32"] < 0.5 and "weight_bits" not in facts
    with load(bundle.path) as model:
        assert all(check.ok for check in model.selftest())

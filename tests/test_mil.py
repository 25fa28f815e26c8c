"""The MIL runtime: every rule against Apple's own semantics or an independent computation, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from evm_deploy._util.silence import silence_libraries
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.runtimes.coreml.tools import coremltools
from evm_deploy.runtimes.mil import MilRuntime, Program, images, rules
from evm_deploy.runtimes.mil.rule import UnsupportedError
from evm_deploy.runtimes.mil.rules import all_rules
from tests.toolchains import need

need("coremltools", module=True)
ct = coremltools()
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function  # noqa: E402

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
Y = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
ROW = rng.standard_normal(5).astype(np.float32)
MATRIX = rng.standard_normal((6, 5)).astype(np.float32)

WHOLE = np.array([[7, 3, 0], [5, 9, 2]], np.int32)
#: Operations that coremltools infers the value of: op -> inputs.
INFERRED = [
    ("add", {"x": X, "y": ROW}),
    ("sub", {"x": X, "y": Y}),
    ("mul", {"x": X, "y": np.float32(0.3)}),
    ("real_div", {"x": X, "y": Y}),
    *((op, {"x": X, "y": Y}) for op in ("maximum", "minimum")),
    ("add", {"x": np.array([1, 2], np.int32), "y": np.int32(3)}),
    ("equal", {"x": WHOLE, "y": np.int32(3)}),
    ("greater", {"x": X, "y": ROW}),
    ("greater_equal", {"x": WHOLE, "y": np.int32(3)}),
    ("logical_and", {"x": WHOLE > 2, "y": WHOLE < 9}),
    ("floor_div", {"x": WHOLE, "y": np.int32(3)}),
    ("floor_div", {"x": X, "y": np.float32(0.7)}),
    ("mod", {"x": WHOLE, "y": np.int32(4)}),
    ("reduce_max", {"x": X, "axes": [2], "keep_dims": False}),
    ("reduce_max", {"x": X, "axes": [0, 1], "keep_dims": True}),
    ("reduce_min", {"x": X, "axes": [-1], "keep_dims": True}),
    ("select", {"cond": X > 0, "a": X, "b": Y}),
    *(("reduce_argmax", {"x": X, "axis": axis, "keep_dims": keep}) for axis, keep in ((-1, False), (1, True))),
    ("topk", {"x": X, "k": 2, "axis": 2}),
    ("topk", {"x": X, "k": 3, "axis": -1, "ascending": True}),
    ("gather", {"x": X, "indices": WHOLE % 3, "axis": 1, "batch_dims": 0}),
    ("gather", {"x": ROW, "indices": np.array([4, 0, 0], np.int32), "axis": 0, "batch_dims": 0}),
    ("gather_along_axis", {"x": ROW[None], "indices": np.array([[4, 0, 2, 2]], np.int32), "axis": 1}),
    *(("pad", {"x": X, "pad": [2, 1, 1, 3], "mode": mode}) for mode in ("replicate", "reflect")),
    *(("band_part", {"x": X, "lower": low, "upper": up}) for low, up in ((-1, 0), (1, -1), (0, 2))),
    *(
        ("reduce_log_sum_exp", {"x": X, "axes": axes, "keep_dims": keep})
        for axes, keep in (([1], True), ([0, 2], False))
    ),
    ("concat", {"values": (np.array([2, 1], np.int32), np.array([7], np.int32)), "axis": 0}),
    *(("argsort", {"x": X, "axis": axis, "ascending": up}) for axis, up in ((-1, True), (1, False))),
    ("shape", {"x": X}),
    ("non_zero", {"x": np.round(X)}),
    ("fill", {"shape": np.array([2, 3], np.int32), "value": np.float32(0.5)}),
    ("fill_like", {"ref_tensor": WHOLE, "value": np.float32(-2)}),
    (
        "scatter_along_axis",
        {"data": X, "indices": np.array([[[[2]], [[-1]]]] * 2, np.int32).repeat(4, 2).repeat(5, 3), "updates": Y[:, :2]}
        | {"axis": 1, "mode": "update"},
    ),
    ("abs", {"x": X}),
    ("erf", {"x": X}),
    ("exp", {"x": X}),
    ("log", {"x": np.abs(X) + 1}),
    ("rsqrt", {"x": np.abs(X), "epsilon": np.float32(0.1)}),
    ("clip", {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(0.25)}),
    ("cumsum", {"x": X, "axis": 2}),
    ("pow", {"x": np.abs(X), "y": np.float32(2.5)}),
    ("reverse", {"x": X, "axes": [1, -1]}),
    ("sigmoid", {"x": 3 * X}),
    ("softplus", {"x": 8 * X}),
    ("sqrt", {"x": X * X}),
    ("gelu", {"x": X, "mode": "EXACT"}),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("softmax", {"x": X, "axis": 1}),
    *((op, {"x": X}) for op in ("abs", "erf", "exp", "square", "relu", "tanh")),
    *((op, {"x": 3 * X}) for op in ("ceil", "cos", "floor", "relu6", "round", "sign", "sin")),
    *((op, {"x": X, "y": np.float32(0.5)}) for op in ("greater", "greater_equal", "less", "less_equal")),
    *((op, {"x": np.round(X), "y": np.round(Y)}) for op in ("equal", "not_equal")),
    *((op, {"x": X > 0, "y": Y > 0}) for op in ("logical_and", "logical_or")),
    ("logical_not", {"x": X > 0}),
    *((op, {"x": 5 * X, "y": np.float32(1.5)}) for op in ("floor_div", "mod")),
    ("leaky_relu", {"x": X, "alpha": np.float32(0.2)}),
    ("sigmoid_hard", {"x": 4 * X, "alpha": np.float32(0.25), "beta": np.float32(0.4)}),
    ("select", {"cond": X > 0, "a": X, "b": Y}),
    *((op, {"x": X, "axes": [1, 2], "keep_dims": True}) for op in ("reduce_max", "reduce_min", "reduce_l2_norm")),
    ("gather", {"x": X, "indices": np.array([[2, 0], [1, -1]], np.int32), "axis": 1}),
    ("cast", {"x": X, "dtype": "int32"}),
    ("layer_norm", {"x": X, "axes": [-1], "gamma": ROW, "beta": 2 * ROW, "epsilon": np.float32(1e-3)}),
    ("layer_norm", {"x": X, "axes": [2, 3]}),
    ("linear", {"x": X, "weight": MATRIX, "bias": MATRIX[:, 0]}),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}),
    ("matmul", {"x": X, "y": Y, "transpose_x": True}),
    ("reduce_sum", {"x": X, "axes": [2], "keep_dims": True}),
    ("reduce_sum", {"x": X, "axes": [1, -1], "keep_dims": False}),
    ("reduce_mean", {"x": X, "axes": [1, 2], "keep_dims": True}),
    ("reshape", {"x": X, "shape": [2, -1, 5]}),
    ("transpose", {"x": X, "perm": [0, 3, 1, -2]}),
    ("expand_dims", {"x": ROW, "axes": [0, 2]}),
    ("squeeze", {"x": X[:1, :, :1], "axes": [0, 2]}),
    ("tile", {"x": X, "reps": [1, 2, 1, 3]}),
    ("pad", {"x": X, "pad": [0, 0, 0, 0, 1, 2, 3, 0], "mode": "constant", "constant_val": np.float32(1.5)}),
    ("split", {"x": X, "axis": -2, "num_splits": 2}),
    ("split", {"x": X, "axis": 3, "split_sizes": [1, 4]}),
    ("concat", {"values": (X, Y), "axis": -1}),
    ("stack", {"values": (X, Y), "axis": 2}),
    ("slice_by_size", {"x": X, "begin": [0, 1, 2, 0], "size": [2, 1, -1, 3]}),
    ("slice_by_index", {"x": X, "begin": [0, 1, 0, -3], "end": [2, 3, 4, 5], "stride": [1, 1, 2, 1]}),
    (
        "slice_by_index",
        {
            "x": X,
            "begin": [1, 0, 2, 0],
            "end": [0, 0, 4, 3],
            "begin_mask": [False, True, False, True],
            "end_mask": [False, True, False, False],
            "squeeze_mask": [True, False, False, False],
        },
    ),
]


def as_given(value):
    """An input as the runtime passes it: floats as tensors, the rest as Python values."""
    if isinstance(value, tuple):
        return [as_given(part) for part in value]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f":
        return torch.from_numpy(np.array(value))
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def computed(op, inputs):
    result = all_rules()[op](**{key: as_given(value) for key, value in inputs.items()})
    return [part.numpy() for part in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize(("op", "inputs"), INFERRED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_rule_is_what_coremltools_infers(op, inputs):
    with silence_libraries(), Function({"x": mb.placeholder(shape=(1,))}, opset_version=ct.target.iOS17):
        inferred = getattr(mb, op)(**inputs)
    inferred = inferred if isinstance(inferred, list | tuple) else [inferred]
    assert all(var.val is not None for var in inferred)
    for var, ours in zip(inferred, computed(op, inputs), strict=True):
        assert ours.shape == tuple(var.shape)
        np.testing.assert_allclose(ours, var.val, rtol=2e-5, atol=2e-6)


def conv_by_hand(x, w, bias, strides, pad, groups):
    top, bottom, left, right = pad
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right))).astype(np.float64)
    kh, kw, per = w.shape[2], w.shape[3], w.shape[0] // groups
    h, wd = (x.shape[2] - kh) // strides[0] + 1, (x.shape[3] - kw) // strides[1] + 1
    y = np.zeros((x.shape[0], w.shape[0], h, wd))
    for o in range(w.shape[0]):
        first = o // per * w.shape[1]
        for i, j in np.ndindex(h, wd):
            at = x[:, first : first + w.shape[1], i * strides[0] :, j * strides[1] :][:, :, :kh, :kw]
            y[:, o, i, j] = (at * w[o]).sum((1, 2, 3)) + bias[o]
    return y


@pytest.mark.parametrize(("groups", "strides", "pad"), [(1, [1, 1], [1, 0, 2, 1]), (4, [2, 1], [0, 0, 0, 0])])
def test_conv_is_a_convolution(groups, strides, pad):
    x, w = rng.standard_normal((2, 4, 6, 5)), rng.standard_normal((8, 4 // groups, 3, 2))
    x, w, bias = x.astype(np.float32), w.astype(np.float32), np.arange(8, dtype=np.float32)
    given = {"x": x, "weight": w, "bias": bias, "strides": strides, "pad_type": "custom", "pad": pad, "groups": groups}
    np.testing.assert_allclose(computed("conv", given)[0], conv_by_hand(x, w, bias, strides, pad, groups), atol=1e-4)


def test_rules_that_coremltools_does_not_infer():
    three = np.arange(1, 4, dtype=np.float32)
    np.testing.assert_allclose(computed("silu", {"x": X})[0], X / (1 + np.exp(-X)), atol=1e-6)
    assert (computed("identity", {"x": X})[0] == X).all()
    given = {
        "x": X,
        "mean": three,
        "variance": 2 * three,
        "gamma": 3 * three,
        "beta": -three,
        "epsilon": np.float32(0.5),
    }
    shape = (1, 3, 1, 1)
    want = (X - three.reshape(shape)) / np.sqrt(2 * three + 0.5).reshape(shape) * 3 * three.reshape(shape)
    np.testing.assert_allclose(computed("batch_norm", given)[0], want - three.reshape(shape), atol=1e-5)
    alternating = computed("concat", {"values": (X, Y), "axis": 1, "interleave": True})[0]
    assert (alternating[:, ::2] == X).all() and (alternating[:, 1::2] == Y).all()
    mean, variance = X.mean((2, 3), keepdims=True), X.var((2, 3), keepdims=True)
    given = {"x": X, "gamma": three, "beta": -three, "epsilon": np.float32(0.5)}
    want = (X - mean) / np.sqrt(variance + 0.5) * three.reshape(shape) - three.reshape(shape)
    np.testing.assert_allclose(computed("instance_norm", given)[0], want, atol=1e-5)
    given = {"values": (X, Y), "equation": "abcd,abed->abce"}
    np.testing.assert_allclose(computed("einsum", given)[0], X @ Y.swapaxes(2, 3), atol=1e-5)
    assert all_rules()["reduce_sum"](torch.tensor([[1, 2]], dtype=torch.int32), [1]).dtype == torch.int32
    given = {"x": X, "scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3)}
    assert (computed("upsample_nearest_neighbor", given)[0] == X.repeat(2, 2).repeat(3, 3)).all()
    label, row = all_rules()["classify"](torch.tensor([[0.1, 0.7, 0.2]]), ["a", "b", "c"])
    assert label == "b" and row.shape == (3,)


@pytest.mark.parametrize(
    ("mode", "write"),
    [
        ("add", np.add),
        ("sub", np.subtract),
        ("mul", np.multiply),
        ("div", np.divide),
        ("max", np.maximum),
        ("min", np.minimum),
        ("update", None),
    ],
)
def test_writes_by_index(mode, write):
    """Against numpy; several writes to one place, but where the last one would stay."""

    def written(at, updates):
        want = X.copy()
        if write:
            write.at(want, at, updates)
        else:
            want[at] = updates
        return want

    rows = np.array([2, -3] if mode == "update" else [2, -1], np.int32)
    given = {"data": X, "indices": rows, "updates": Y[:, :2], "axis": 1, "mode": mode}
    np.testing.assert_allclose(computed("scatter", given)[0], written((slice(None), rows), Y[:, :2]), rtol=1e-5)
    places = np.array([[[1, 0], [0, 2]], [[0, 1], [0, 0 if mode == "update" else 2]]], np.int32)
    given = {"data": X, "indices": places, "updates": Y[:, :2], "mode": mode}
    want = written((places[..., 0], places[..., 1]), Y[:, :2])
    np.testing.assert_allclose(computed("scatter_nd", given)[0], want, rtol=1e-5)
    along = np.zeros((2, 1, 4, 5), np.int32) + np.arange(5, dtype=np.int32) % 3
    given = {"data": X, "indices": along, "updates": Y[:, :1], "axis": 1, "mode": mode}
    grid = np.ogrid[:2, :1, :4, :5]
    want = written((grid[0], along, grid[2], grid[3]), Y[:, :1])
    np.testing.assert_allclose(computed("scatter_along_axis", given)[0], want, rtol=1e-5)


def test_reads_by_index_and_crops():
    places = np.array([[1, 0], [0, 2]], np.int32)
    np.testing.assert_array_equal(computed("gather_nd", {"x": X, "indices": places})[0], X[[1, 0], [0, 2]])
    sizes = all_rules()["concat"]([torch.tensor(2), 3, torch.tensor([4])], 0)  # scalars, as of a shape
    assert sizes.tolist() == [2, 3, 4]
    given = {"x": X, "crop_height": [1, 0], "crop_width": [2, 1]}
    np.testing.assert_array_equal(computed("crop", given)[0], X[..., 1:, 2:-1])


@pytest.mark.parametrize("latest", [True, False])
def test_non_maximum_suppression(latest):
    """Boxes are centres and sizes; the second overlaps the first by 0.6, the third by 1/3."""
    boxes = np.array([[[5, 5, 10, 10], [7.5, 5, 10, 10], [10, 5, 10, 10], [50, 5, 10, 10]]], np.float32)
    scores = np.array([[[0.9], [0.95], [0.5], [-1]]], np.float32)
    limits = {"iou_threshold": np.float32(0.5), "max_boxes": 5}
    if latest:  # of iOS17: no threshold, no count
        found, kept, index = computed(
            "non_maximum_suppression", {"boxes": boxes.swapaxes(1, 2), "scores": scores.swapaxes(1, 2), **limits}
        )
        found, kept = found.swapaxes(1, 2), kept.swapaxes(1, 2)
        assert index[0, :2].tolist() == [1, 3]
    else:
        limits["score_threshold"] = np.float32(0)
        found, kept, index, count = computed("non_maximum_suppression", {"boxes": boxes, "scores": scores, **limits})
        assert count.tolist() == [1] and index[0, 0] == 1
    assert (found[0, 0] == boxes[0, 1]).all() and kept[0, 0, 0] == np.float32(0.95)
    assert not kept[0, 2 if latest else 1 :].any()


def test_quantisation_rules():
    values = np.array([-200.0, -1.26, -0.75, 0.24, 0.25, 0.75, 1.5, 63.4, 1000.0], np.float32)
    given = {"input": values, "scale": np.float32(0.5), "output_dtype": "int8"}
    assert computed("quantize", given)[0].tolist() == [-128, -3, -2, 0, 0, 2, 3, 127, 127]  # halves to even
    given |= {"zero_point": 10, "output_dtype": "uint8"}
    assert computed("quantize", given)[0].tolist() == [0, 7, 8, 10, 10, 12, 13, 137, 255]
    stored = np.array([[-127, 5], [100, 0]], np.int8)
    scale = np.array([0.5, 0.25], np.float32)
    given = {"quantized_data": stored, "zero_point": np.int8(0), "scale": scale, "axis": 0}
    assert (computed("constexpr_affine_dequantize", given)[0] == stored * scale[:, None]).all()
    given = {"data": stored, "scale": scale[None] * np.ones((1, 2), np.float32), "offset": np.ones((1, 1), np.float32)}
    assert (computed("constexpr_blockwise_shift_scale", given)[0] == (stored - 1.0) * scale).all()
    back = all_rules()["dequantize"](torch.tensor([-128, 3], dtype=torch.int8), torch.tensor(0.5), 1)
    assert back.tolist() == [-64.5, 1.0]


def test_every_rule_is_tested_here():
    elsewhere = {"conv", "silu", "identity", "batch_norm", "classify", "quantize", "dequantize"}
    elsewhere |= {"upsample_nearest_neighbor", "non_maximum_suppression"}
    elsewhere |= {"constexpr_affine_dequantize", "constexpr_blockwise_shift_scale"}
    elsewhere |= {"crop", "gather_nd", "scatter", "scatter_nd"}
    elsewhere |= {"einsum", "instance_norm", *images.RULES}  # images: test_mil_images.py
    assert set(all_rules()) == elsewhere | {op for op, _ in INFERRED}
    tables = (rules._elementwise(), *(module.RULES for module in (rules, *rules.MODULES)))
    assert sum(map(len, tables)) == len(all_rules())  # an operation has one rule


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("pad", {"x": X, "pad": [0, 0, 0, 0, 1, 1, 1, 1], "mode": "wrap"}),
        ("scatter", {"data": X, "indices": [0], "updates": Y[:1], "mode": "max_of_all"}),
        ("gather_nd", {"x": X, "indices": WHOLE[:, :1] % 2, "batch_dims": 1}),
        ("conv", {"x": X, "weight": X, "pad_type": "same_lower"}),
        ("cast", {"x": X, "dtype": "uint8"}),
        ("cumsum", {"x": X, "axis": 0, "reverse": True}),
        ("reshape", {"x": X, "shape": [0, -1]}),
        ("slice_by_index", {"x": X, "begin": [0] * 4, "end": [1] * 4, "stride": [-1] * 4}),
        ("gather", {"x": X, "indices": WHOLE, "axis": 1, "batch_dims": 1}),
        ("topk", {"x": X, "k": 1, "output_indices_dtype": "int16"}),
        ("upsample_nearest_neighbor", {"x": X, "scale_factor_height": np.float32(1.5)}),
        ("non_maximum_suppression", {"boxes": X[0], "scores": X[0], "iou_threshold": np.float32(0.5), "max_boxes": 1}),
        ("quantize", {"input": X, "scale": np.float32(1), "output_dtype": "int4"}),
    ],
)
def test_variants_without_a_rule_are_refused(op, inputs):
    with pytest.raises(UnsupportedError):
        computed(op, inputs)


def save(function, path, half=False, **shapes):
    """A program of `function` over inputs of these shapes, as a package."""
    specs = [mb.TensorSpec(shape=shape) for shape in shapes.values()]
    with silence_libraries():
        program = mb.program(input_specs=specs, opset_version=ct.target.iOS17)(function)
        precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
        model = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=precision,
            skip_model_load=True,
        )
        model.save(str(path))
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """exp(x) * c + x in float16."""

    def function(x):
        grown = mb.exp(x=x, name="grown")
        return mb.add(x=mb.mul(x=grown, y=np.float32(0.1), name="scaled"), y=x, name="y")

    return save(function, tmp_path_factory.mktemp("chain") / "chain.mlpackage", half=True, x=(2, 3))


def test_float16_is_rounded_after_every_operation(chain):
    x = X[0, 0, :2, :3]
    program = Program(chain)
    (name,) = program.outputs
    half = x.astype(np.float16)
    grown = np.exp(half.astype(np.float32)).astype(np.float16)
    want = (grown * np.float16(0.1)).astype(np.float16) + half
    assert (program.run({"x": x})[name] == want.astype(np.float32)).all()
    exact = Program(chain, exact=True).run({"x": x})[name]
    np.testing.assert_allclose(exact, np.exp(x) * np.float32(np.float16(0.1)) + x, rtol=1e-6)
    assert not np.array_equal(exact, want)


def test_float16_overflows(chain):
    assert np.isinf(Program(chain).run({"x": np.full((2, 3), 12, np.float32)})[Program(chain).outputs[0]]).all()


def test_tensors_between_operations_can_be_fed_and_wanted(chain):
    program = Program(chain)
    x = X[0, 0, :2, :3]
    names = [op.results[0].name for op in program.operations if op.type in ("exp", "mul")]
    values = program.run({"x": x}, names)
    again = program.run({names[0]: values[names[0]]}, [names[1]])
    assert (again[names[1]] == values[names[1]]).all()
    with pytest.raises(UsageError, match="missing tensors: x"):
        program.run({names[0]: values[names[0]]})
    with pytest.raises(UsageError, match="missing tensors: nothing_such"):
        program.run({"x": x}, ["nothing_such"])


def test_a_feed_of_another_shape_is_refused(chain):
    with pytest.raises(BundleError, match=r"feed gives float32\[3, 2\], declared is fp32\[2, 3\]"):
        Program(chain).run({"x": np.zeros((3, 2), np.float32)})


def test_operations_without_a_rule_are_refused(tmp_path):
    path = save(lambda x: mb.sinh(x=x), tmp_path / "m.mlpackage", x=(4,))
    with pytest.raises(BundleError, match="no rule for sinh"):
        Program(path)


def edited(package, edit):
    """The package with its specification changed by edit(block, spec)."""
    file = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = ct.utils.load_spec(str(package))
    function = spec.mlProgram.functions["main"]
    edit(function.block_specializations[function.opset])
    file.write_bytes(spec.SerializeToString())
    return package


def test_a_declared_shape_that_is_wrong_is_noticed(tmp_path):
    path = save(lambda x: mb.exp(x=mb.relu(x=x)), tmp_path / "m.mlpackage", x=(4, 6))

    def narrower(block):
        relu = next(op for op in block.operations if op.type == "relu")
        relu.outputs[0].type.tensorType.dimensions[1].constant.size = 5

    with pytest.raises(BundleError, match="not a readable mlprogram package"):
        Program(edited(path, narrower))


def test_a_rule_that_gives_another_shape_or_type_is_noticed(chain, monkeypatch):
    rules = all_rules()
    for broken, message in (
        (lambda x: x[:1], r"exp .* gives float32\[1, 3\], declared is fp16\[2, 3\]"),
        (lambda x: x.int(), r"exp .* gives int32\[2, 3\]"),
        (lambda x: (x, x), "gives 2 results, declared are 1"),
    ):
        monkeypatch.setitem(rules, "exp", broken)
        with pytest.raises(BundleError, match=message):
            Program(chain).run({"x": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize("damage", ["no file", "empty", "cut", "no weights", "text"])
def test_damaged_packages(damage, tmp_path):
    big = rng.standard_normal((40, 40)).astype(np.float32)
    path = save(lambda x: mb.linear(x=x, weight=big), tmp_path / "m.mlpackage", x=(2, 40))
    spec, weights = (path / "Data" / "com.apple.CoreML" / name for name in ("model.mlmodel", "weights/weight.bin"))
    assert Program(path).run({"x": big[:2]})  # before the damage
    if damage == "no file":
        spec.unlink()
    elif damage == "no weights":
        weights.unlink()
    else:
        content = spec.read_bytes()
        spec.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"not a model"}[damage])
    with pytest.raises(BundleError, match="not a readable mlprogram package"):
        Program(path)


def test_missing_packages_and_functions(tmp_path, chain):
    with pytest.raises(BundleError, match="does not exist"):
        Program(tmp_path / "no.mlpackage")
    with pytest.raises(BundleError, match="has no function 'r224'; it has: main"):
        MilRuntime(chain, "r224")


@pytest.mark.slow
def test_the_module_runs_by_itself(chain, tmp_path):
    command = [sys.executable, "-m", "evm_deploy.runtimes.mil", str(chain)]
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 3), np.float32))
    flags = ["--inputs", str(tmp_path / "x.npz"), "--outputs", str(tmp_path / "y.npz"), "--exact"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "x float32[2, 3]" in done.stdout and "exp 1" in done.stdout
    (y,) = np.load(tmp_path / "y.npz").values()
    np.testing.assert_allclose(y, 0.1, atol=1e-4)
    failed = subprocess.run([*command[:-1], "no.mlpackage"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr == "evm_deploy.runtimes.mil: no.mlpackage does not exist\n"

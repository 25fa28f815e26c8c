"""EVSS blocks with int8 linear layers as one op: against Q/DQ in float64, against integers, against its graph."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from evm_deploy import plugin_path
from evm_deploy.errors import BundleError
from evm_deploy.export.hub.fuse import fuse_module
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan.fused import SCAN_OUTPUTS
from evm_deploy.scan.native import without_native_scan
from tests.test_fused import LARGE_MAPS, hub, image, isa, random_block  # noqa: F401 (isa is a fixture)

#: The linear layers that are modules, by operand: path of the module, axis of the output channels in the operand.
LAYERS = {
    "in_proj": ("op.in_proj", 1),
    "out_proj": ("op.out_proj", 1),
    "local_proj_weight": ("conv_branch.3", 0),
}
INT8 = (*LAYERS, "x_proj")  # operands of evm::EVSSBlockInt8XProj in int8


class QuantizedLayer(nn.Module):
    """QuantizeLinear and DequantizeLinear around a linear layer or a 1x1 convolution, in float64."""

    def __init__(self, weight, scale, input_scale, input_zero_point, bias, channel_axis):
        super().__init__()
        self.weight, self.scale, self.bias = (torch.from_numpy(a.astype(np.float64)) for a in (weight, scale, bias))
        self.input_scale, self.zero_point, self.channel_axis = float(input_scale), int(input_zero_point), channel_axis

    def forward(self, x):
        x = x.movedim(self.channel_axis, -1)
        q = torch.clamp(torch.round(x / self.input_scale) + self.zero_point, 0, 255) - self.zero_point
        y = (q @ self.weight) * (self.input_scale * self.scale) + self.bias
        return y.movedim(-1, self.channel_axis)


def input_quantization(values, zero_point=None):
    """Scale and zero point of a tensor: of all of its range, or of what `zero_point` allows."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if zero_point is None:
        scale = np.float32(max(high - low, 1e-6) / 255)
        return scale, np.uint8(np.clip(round(-low / scale), 0, 255))
    sides = [high / (255 - zero_point) if zero_point < 255 else 0, -low / zero_point if zero_point else 0]
    return np.float32(max(*sides, 1e-6)), np.uint8(zero_point)


def quantized(block, x, zero_points=(None, None, None, None), x_proj=True, largest=127):
    """Operands of an int8 block, by name: weights of `block` per channel, inputs by their range on x.

    x_proj: whether x_proj is int8, too. largest: magnitude of the largest weight; 64 with --weight-bits 7.
    """
    with torch.inference_mode(), without_native_scan():
        ranges = record(block, x)
    operands = {}
    for name, value in block.fused_op().operands.items():
        operands[name] = value.contiguous().numpy()
        if name in LAYERS or (x_proj and name == "x_proj"):
            weight, zero_point = operands[name], zero_points[INT8.index(name)]
            summed = (1,) if name == "x_proj" else tuple({*range(weight.ndim)} - {LAYERS[name][1]})
            scale = np.abs(weight).max(summed, keepdims=True) / np.float32(largest)
            operands[name] = np.round(weight / scale).astype(np.int8)
            operands[f"{name}_scale"] = scale if name == "x_proj" else scale.reshape(-1)
            quantization = input_quantization(ranges[name], zero_point)
            operands |= zip((f"{name}_input_scale", f"{name}_input_zero_point"), quantization, strict=True)
    return operands


def record(block, x):
    """Record the inputs of a block's linear layers, by operand."""
    seen, project = {}, block.op.project
    block.op.project = lambda u: project(seen.setdefault("x_proj", u))
    hooks = [
        block.get_submodule(path).register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        for name, (path, _) in LAYERS.items()
    ]
    block(torch.from_numpy(x))
    for hook in hooks:
        hook.remove()
    del block.op.project
    return seen


def in_float64(block, operands, x):
    """The block with Q/DQ around its linear layers."""
    double = copy.deepcopy(block).double()
    for name, (path, _) in LAYERS.items():
        weight, quantization = (
            operands[name],
            [operands[f"{name}_{end}"] for end in ("scale", "input_scale", "input_zero_point")],
        )
        convolution = weight.ndim == 4
        bias = operands["local_proj_bias"] if convolution else np.zeros(1)
        weight = weight[:, :, 0, 0].T if convolution else weight
        parent, _, child = path.rpartition(".")
        layer = QuantizedLayer(weight, *quantization, bias, 1 if convolution else -1)
        setattr(double.get_submodule(parent), child, layer)
    if "x_proj_scale" in operands:
        of_x_proj = [operands[f"x_proj{end}"] for end in ("", "_scale", "_input_scale", "_input_zero_point")]
        double.op.project = QuantizedLayer(*of_x_proj, np.zeros(1), -1).forward
    with torch.inference_mode(), without_native_scan():
        return double(torch.from_numpy(x).double()).numpy()


def int8_model(operands, b, H, W, scan_outputs=False, functions=()):
    """Return a model of a single node, an int8 block. functions: bodies for runtimes without the kernel."""
    op_type = "EVSSBlockInt8XProj" if "x_proj_scale" in operands else "EVSSBlockInt8"
    outputs = ["out", *(SCAN_OUTPUTS if scan_outputs else ())]
    unread = [""] * (len(functions[0].output) - len(outputs) if functions else 0)
    node = helper.make_node(op_type, ["x", *operands], [*outputs, *unread], domain="evm")
    graph = helper.make_graph(
        [node],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [b, H, W, len(operands["norm_weight"])])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in operands.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("evm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return model.SerializeToString()


def run(model, x, threads=1):
    return OnnxRuntime(model, threads, plugin_path("onnxruntime")).run({"x": x})


def quantized_integers(values, zero_point):
    """Saturated integers less the zero point; `values` in steps."""
    return (np.clip(np.rint(values) + zero_point, 0, 255) - zero_point).astype(np.int64)


def exact_block(seed, x_proj=True):
    """x, operands, out and the scan's u (0 for the negative), B and C of a block that rounds nothing but large sums.

    Scales are powers of two, norms give their bias, SiLU and GELU are far from 0 and the gates 1: out is scan branch +
    local branch, bit for bit what integer sums say. Half steps and saturation are frequent, of values beyond 16 and 32
    bits too; the sums of every third block go beyond 2^24, with weights of 7 bits 2^23. x_proj: whether x_proj is int8,
    with such sums; else it is 0. Of nine blocks three have weights of 8 bits, three of 7 bits, whose products may be
    added in 16 bits, and three of 7 bits but for one layer: 8 bits, or 65 where the sums are large.
    """
    g, huge, kind = np.random.default_rng(seed), seed % 3 == 0, seed // 3 % 3
    wide, beyond = seed % len(INT8), 2**23 if kind else 2**24

    def weights_of(layer, shape):
        too_large = kind == 2 and layer == wide
        largest = 64 if kind and not too_large else 65 if kind and huge else 127
        low = largest - 4 if huge or too_large else -largest - (largest == 127)
        drawn = g.integers(low, largest + 1, shape)
        return drawn if layer != 2 else -drawn - (largest == 127)

    b, H, W = (int(g.integers(1, high)) for high in (3, 5, 5))
    C = int(g.choice([600, 700] if huge else [1, 3, 17, 48, 130, 600]))
    d, G = int(g.choice([600, 700] if huge else [1, 2, 35, 96, 700])), int(g.integers(1, 4))
    zero_points = [0 if huge else int(g.choice([0, 255, 128, int(g.integers(256))])) for _ in INT8]
    shapes = ((C, 2 * d), (d, C), (C, C))
    weights = [weights_of(*layer) for layer in enumerate(shapes)]
    exponents = [g.integers(9, 12, weight.shape[1]) for weight in weights]  # of the scales of the columns
    steps, input_scales = g.integers(500 if huge else -600, 600, C) / 2, [2.0**-2, 2.0**-6, 2.0]
    far = np.flatnonzero(g.random(C) < 0.1) if not huge else []
    steps[far] = g.choice([-1, 1], len(far)) * 2.0 ** g.choice([16, 33, 60], len(far))

    sums = quantized_integers(steps, zero_points[0]) @ weights[0]
    x, z = np.split(sums.astype(np.float32) * np.ldexp(np.float32(1), (exponents[0] - 2)), 2)
    shrink = (np.floor if huge else np.ceil)(np.log2(np.maximum(np.abs(sums[d:]), 300) / 300))
    sign = np.ones(d) if huge else g.choice([-1, 1], d)
    out_norm_bias = sign * 2.0 ** (-6 - shrink - (exponents[0][d:] - 2))
    gated = quantized_integers(out_norm_bias * np.maximum(z, 0).astype(np.float64) * 2**6, zero_points[1])
    s = (gated @ weights[1]).astype(np.float32) * np.ldexp(np.float32(1), (exponents[1] - 6))
    activated = g.choice([1 if huge else -1, 1, 1, 1], C) * g.integers(
        500 if huge else 8, 600, C
    )  # before GELU, scale 2
    local_sums = quantized_integers(np.maximum(activated, 0) / 2, zero_points[2]) @ weights[2]
    assert not huge or min(np.abs(of).max() for of in (sums, gated @ weights[1], local_sums)) > beyond
    local_bias = g.standard_normal(C).astype(np.float32)
    local = local_sums.astype(np.float32) * np.ldexp(np.float32(1), (exponents[2] + 1)) + local_bias

    convolution = np.zeros((d, 1, 3, 3))
    convolution[:, :, 1, 1] = 1
    operands = {
        "norm_weight": np.zeros(C), "norm_bias": steps * input_scales[0], "in_proj": weights[0],
        "conv_weight": convolution, "conv_bias": np.zeros(d), "x_proj": np.zeros((4, d, 5)),
        "dt_proj": np.zeros((4, 1, d)), "A": -np.ones((4, d, 2)), "skip": np.zeros((4, d)), "dt_bias": np.zeros((4, d)),
        "out_norm_weight": np.zeros(d), "out_norm_bias": out_norm_bias, "out_proj": weights[1],
        "local_conv_weight": np.zeros((C, 1, 3, 3)), "local_conv_bias": activated,
        "local_proj_weight": weights[2].T.reshape(C, C, 1, 1), "local_proj_bias": local_bias,
        "gate_norm_weight": np.zeros(C), "gate_norm_bias": np.zeros(C), "gate_reduce_weight": np.zeros((C, G)),
        "gate_reduce_bias": np.zeros(G), "gate_select_weight": np.zeros((G, C)), "gate_select_bias": np.full(C, 200.0),
    }  # fmt: skip
    out = np.broadcast_to(s + local, (b, H, W, C))
    u = np.broadcast_to(np.maximum(x, 0), (b, H, W, d)).copy()
    u = split_directions(torch.from_numpy(u), H, W).numpy()
    states = np.zeros((*u.shape[:3], 4), np.float32)
    if x_proj:
        step = int(np.floor(np.log2(np.quantile(x, 0.1) / 255 if huge else max(u.max(), 1) / 400)))
        operands["x_proj"] = weights_of(3, (4, d, 5))
        exponents.append(g.integers(-30, -26, (4, 1, 5)) - step)
        input_scales.append(2.0**step)
        of_x_proj = quantized_integers(u.astype(np.float64) / 2.0**step, zero_points[3]) @ operands["x_proj"]
        assert not huge or of_x_proj.max() > beyond
        states = (of_x_proj.astype(np.float32) * np.ldexp(np.float32(1), exponents[3] + step))[..., 1:]  # without dt
    complete = {}
    for name, value in operands.items():
        int8 = name in LAYERS or (x_proj and name == "x_proj")
        complete[name] = value.astype(np.int8 if int8 else np.float32)
        if int8:
            i = INT8.index(name)
            complete[f"{name}_scale"] = np.ldexp(np.float32(1), exponents[i])
            complete[f"{name}_input_scale"] = np.float32(input_scales[i])
            complete[f"{name}_input_zero_point"] = np.uint8(zero_points[i])
    return np.zeros((b, H, W, C), np.float32), complete, out, u, states[..., :2], states[..., 2:]


def split_directions(x, H, W):
    """Return the inputs of the four directions, (b, 4, L, d), with zeros where an odd size is padded."""
    x = nn.functional.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    phases = [x[:, k % 2 :: 2, k // 2 :: 2] for k in range(4)]
    return torch.stack([(p.transpose(1, 2) if k % 2 else p).flatten(1, 2) for k, p in enumerate(phases)], 1)


def test_sums_are_the_same_integers_on_every_instruction_set(isa):  # noqa: F811
    for seed in range(24):
        x, operands, want, want_u, *want_states = exact_block(seed, x_proj=seed % 4 > 0)
        got = run(int8_model(operands, *x.shape[:3], scan_outputs=True), x)
        np.testing.assert_array_equal(got["out"], want)
        np.testing.assert_array_equal(np.maximum(got["u"], 0), want_u)
        np.testing.assert_array_equal([got["B"], got["C"]], want_states)


def test_any_block(isa):  # noqa: F811
    """Against Q/DQ in float64: odd maps, any width, more than 64 states, zero points at either end.

    float32 puts a few values on the other side of a rounding boundary, and one such step is seen in everything that
    follows. So every output must be within some steps, and nearly all blocks must agree as closely as float ones do.
    """
    tight = []

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        st.integers(0, 999), st.integers(1, 2), st.integers(1, 13), st.integers(1, 13), st.integers(8, 70),
        st.integers(1, 9), st.integers(1, 80), st.tuples(*[st.sampled_from([None, None, 0, 255, 100])] * 4),
        st.booleans(), st.sampled_from([127, 64]),
    )  # fmt: skip
    def check(seed, b, H, W, dim, rank, states, zero_points, x_proj, largest):
        block, x = random_block(seed, dim, rank, states), image(seed, b, H, W, dim)
        operands = quantized(block, x, zero_points, x_proj, largest)
        out, want = run(int8_model(operands, b, H, W), x)["out"], in_float64(block, operands, x)
        error = np.abs(out - want) / np.abs(want).max()
        assert error.max() < 0.05
        tight.append(error.max() < 3e-6)

    check()
    assert np.mean(tight) > 0.8


@pytest.mark.parametrize("shape", LARGE_MAPS)
def test_large_maps(shape, isa):  # noqa: F811
    block, x = random_block(3, shape[-1], 3, 4), image(3, *shape)
    operands = quantized(block, x)
    out, want = run(int8_model(operands, *shape[:3]), x)["out"], in_float64(block, operands, x)
    error = np.abs(out - want) / np.abs(want).max()
    assert error.max() < 0.05 and np.mean(error < 1e-4) > 0.9


def test_int8_is_not_float(isa):  # noqa: F811
    """The control of the tolerances above: quantisation changes far more than they allow, and not everything."""
    block, x = random_block(5, 48, 3, 16), image(5, 1, 9, 8, 48)
    operands = quantized(block, x)
    out, exact = run(int8_model(operands, 1, 9, 8), x)["out"], block(torch.from_numpy(x)).numpy()
    assert 1e-4 < np.abs(out - exact).max() / np.abs(exact).max() < 0.05


def test_threads_do_not_change_a_bit():
    block, x = random_block(2, 48, 3, 16), image(2, 2, 49, 43, 48)
    model = int8_model(quantized(block, x), 2, 49, 43, scan_outputs=True)
    one, three = (run(model, x, threads) for threads in (1, 3))
    for name in one:
        np.testing.assert_array_equal(one[name], three[name])


@pytest.mark.parametrize(
    ("operand", "change", "message"),
    [
        ("in_proj", lambda v: v[:, :-1], "in_proj_scale has 64 on axis 0 (Z), in_proj asks for 63"),
        ("out_proj", lambda v: v[:, :-1], "out_proj has 15 on axis 1 (C), x asks for 16"),
        ("out_proj_scale", lambda v: v[:-1], "out_proj_scale has 15 on axis 0 (C), x asks for 16"),
        ("local_proj_weight", lambda v: v[:-1], "local_proj_weight has 15 on axis 0 (C), x asks for 16"),
        ("local_proj_weight_scale", lambda v: v[None], "local_proj_weight_scale has rank 2, expected 1"),
        ("in_proj_input_scale", lambda v: v[None], "in_proj_input_scale has rank 1, expected 0"),
        ("in_proj_input_zero_point", lambda v: v[None], "in_proj_input_zero_point has rank 1, expected 0"),
        ("x_proj", lambda v: v[:, :-1], "x_proj has 31 on axis 1 (d), conv_weight asks for 32"),
        ("x_proj_scale", lambda v: v[:, 0], "x_proj_scale has rank 2, expected 3"),
        ("x_proj_scale", lambda v: v.repeat(2, 1), "x_proj_scale has 2 on axis 1 (1), the op asks for 1"),
        ("x_proj_input_scale", lambda v: v * 0, "x_proj_input_scale is 0, expected a positive number"),
        ("in_proj_input_scale", lambda v: v * 0, "in_proj_input_scale is 0, expected a positive number"),
        ("out_proj_input_scale", lambda v: -v, "expected a positive number"),
        ("local_proj_weight_input_scale", lambda v: v * np.float32(np.nan), "nan, expected a positive number"),
    ],
)
def test_wrong_operands_are_errors_not_crashes(operand, change, message):
    x = image(0, 1, 8, 8, 16)
    operands = quantized(random_block(4, 16, 1, 16), x)
    operands[operand] = (
        np.ascontiguousarray(change(operands[operand]))
        if operands[operand].ndim
        else np.asarray(change(operands[operand]))
    )
    with pytest.raises(BundleError) as error:
        run(int8_model(operands, 1, 8, 8), x)
    assert message in str(error.value)


@pytest.mark.parametrize("operand", ["in_proj", "out_proj_input_zero_point", "local_proj_weight_scale"])
def test_wrong_types_are_errors(operand):
    x = image(0, 1, 8, 8, 16)
    operands = quantized(random_block(4, 16, 1, 16), x)
    operands[operand] = operands[operand].astype(np.int32)
    with pytest.raises(BundleError, match=rf"tensor\(int32\)' of input parameter \({operand}\)"):
        run(int8_model(operands, 1, 8, 8), x)


def with_qdq(function):
    """The body of a float block with Q/DQ nodes around its int8 layers, as the body of evm::EVSSBlockInt8XProj."""
    nodes, inputs = [], []
    for name in function.input:
        ends = ("", "_scale", "_input_scale", "_input_zero_point") if name in INT8 else ("",)
        inputs += [name + end for end in ends]
    for node in function.node:
        for name in set(node.input) & set(INT8):
            of_input = [f"{name}_input_scale", f"{name}_input_zero_point"]
            nodes += [
                helper.make_node("QuantizeLinear", [node.input[0], *of_input], [f"{name}_q"]),
                helper.make_node("DequantizeLinear", [f"{name}_q", *of_input], [f"{name}_x"]),
            ]
            if name in LAYERS:
                reads = [name, f"{name}_scale"]
                nodes.append(helper.make_node("DequantizeLinear", reads, [f"{name}_w"], axis=LAYERS[name][1]))
            else:
                nodes.append(helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT))
                nodes.append(helper.make_node("Mul", [f"{name}_f", f"{name}_scale"], [f"{name}_w"]))
            copied = onnx.NodeProto()
            copied.CopyFrom(node)
            copied.input[:2] = [f"{name}_x", f"{name}_w"]
            node = copied
        nodes.append(node)
    assert len(nodes) == len(function.node) + 3 * len(LAYERS) + 4
    outputs, opsets = list(function.output), function.opset_import
    return helper.make_function("evm", "EVSSBlockInt8XProj", inputs, outputs, nodes, opsets)


@pytest.fixture(scope="module")
def traced(micro):
    """A block of the micro model, its size, and its traced nodes as a function, with that of the scan."""
    graph, _ = hub(micro)
    path, op = next(iter(graph.fusable.items()))
    fuse_module(graph.model, path, op)
    node = next(node for node in graph.model.graph.node if node.op_type == "EVSSBlock")
    shapes = onnx.shape_inference.infer_shapes(graph.model).graph.value_info
    shape = next([d.dim_value for d in v.type.tensor_type.shape.dim] for v in shapes if v.name == node.input[0])
    model, _ = load_checkpoint(micro)
    return model.get_submodule(path), shape, graph.model.functions


def test_registered_the_kernel_runs_otherwise_the_body(traced):
    block, (b, H, W, dim), functions = traced
    x = image(3, b, H, W, dim)
    operands = quantized(block, x)
    body = with_qdq(next(f for f in functions if f.name == "EVSSBlock"))
    scan = next(f for f in functions if f.name == "SelectiveScan")
    model = int8_model(operands, b, H, W, functions=[body, scan])
    portable, kernel = OnnxRuntime(model, 1, exact_integers=True).run({"x": x})["out"], run(model, x)["out"]
    error = np.abs(portable - kernel) / np.abs(kernel).max()
    assert error.max() < 0.01 and np.median(error) < 1e-5

    names = ["x", *operands]
    nodes = [helper.make_node("Add", ["x", "x"], ["out"])]
    other = helper.make_function("evm", "EVSSBlockInt8XProj", names, ["out"], nodes, [helper.make_opsetid("", 20)])
    model = int8_model(operands, b, H, W, functions=[other])
    np.testing.assert_array_equal(OnnxRuntime(model, 1).run({"x": x})["out"], 2 * x)
    np.testing.assert_array_equal(run(model, x)["out"], kernel)

"""EVSS blocks as one op: the native kernel, the pass that makes the nodes, and the normalisation of pixels."""

from __future__ import annotations

import golden
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from evm_deploy import plugin_path
from evm_deploy.bundle.loaded import load
from evm_deploy.errors import BundleError, ToolchainError
from evm_deploy.export.hub.fold_normalisation import fold_normalisation
from evm_deploy.export.hub.fuse import fuse_module, match_constants
from evm_deploy.export.hub.graph import trace, with_pre_and_postprocessing
from evm_deploy.export.pipeline import complete, export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.model.efficientvmamba.blocks import EVSSBlock
from evm_deploy.model.families import load_checkpoint
from evm_deploy.runtimes.base import Batch
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan import reference
from evm_deploy.scan.fused import SCAN_OUTPUTS, STAGES
from evm_deploy.scan.native import without_native_scan
from evm_deploy.toolchain.plugins import block_trace
from tests.test_native import isas, library


def random_block(seed, dim, rank, states, spread=1.0):
    """An EVSS block in which every part matters: the scan, both branches, the gates, BatchNorm's statistics."""
    torch.manual_seed(seed)
    block = EVSSBlock(dim, rank, states).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) / max(1.0, parameter[0].numel()) ** 0.5)
    for norm in (block.norm, block.op.out_norm, block.se.norm, block.conv_branch[1]):
        norm.weight.add_(1)
    block.conv_branch[1].running_mean.normal_()
    block.conv_branch[1].running_var.uniform_(0.5, 2)
    block.op.dt_projs_weight.mul_(spread)
    block.op.A_logs.copy_(torch.randn_like(block.op.A_logs))
    return block


def block_model(block, b, H, W, scan_outputs=False, body=None):
    """Return a model of a single evm::EVSSBlock node. body: function for runtimes without the kernel."""
    op = block.fused_op()
    dim = block.norm.normalized_shape[0]
    outputs = ["out", *(SCAN_OUTPUTS if scan_outputs else ())]
    node = helper.make_node("EVSSBlock", ["x", *op.operands], outputs, domain="evm")
    graph = helper.make_graph(
        [node],
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [b, H, W, dim])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in op.operands.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("evm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[body] if body else [])
    return model.SerializeToString()


def in_float64(block, x):
    double = random_block(0, block.norm.normalized_shape[0], block.op.dt_rank, block.op.d_state).double()
    double.load_state_dict(block.state_dict())
    with without_native_scan():  # the scan itself is float32 in the network too
        return double(torch.from_numpy(x).double()).numpy()


def image(seed, b, H, W, dim):
    return np.random.default_rng(seed).standard_normal((b, H, W, dim)).astype(np.float32)


@pytest.fixture(params=isas())
def isa(request):
    assert library().evm_scan_force_isa(request.param.encode())
    yield request.param
    library().evm_scan_force_isa(None)


def test_any_block(isa):
    """Widths that are no multiple of a vector, one pixel, odd maps, any number of states and ranks, several images."""

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        st.integers(0, 999), st.integers(1, 3), st.integers(1, 17), st.integers(1, 17),
        st.integers(8, 70), st.integers(1, 9), st.integers(1, 80), st.sampled_from([0.1, 1.0, 5.0]),
    )  # fmt: skip
    def check(seed, b, H, W, dim, rank, states, spread):
        block, x = random_block(seed, dim, rank, states, spread), image(seed, b, H, W, dim)
        out = OnnxRuntime(block_model(block, b, H, W), 1, plugin_path("onnxruntime")).run({"x": x})["out"]
        want = in_float64(block, x)
        assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()

    check()


LARGE_MAPS = [(2, 61, 59, 48), (1, 9, 700, 16), (1, 300, 5, 24)]  # several groups of rows (native/scan/block_layout.h)


@pytest.mark.parametrize("shape", LARGE_MAPS)
def test_large_maps(shape, isa):
    block, x = random_block(3, shape[-1], 3, 4), image(3, *shape)
    out = OnnxRuntime(block_model(block, *shape[:3]), 1, plugin_path("onnxruntime")).run({"x": x})["out"]
    want = in_float64(block, x)
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()


def with_weights_as_inputs(model):
    """The model with its initializers as inputs, and their values as feeds."""
    model = onnx.load_from_string(model)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.graph.ClearField("initializer")
    return model.SerializeToString(), weights


def ticks_of_packing(library, run):
    """Run one inference of a block; return the clock ticks of the stage that packs weights, and the result."""
    run()
    with block_trace(library, 1, len(STAGES)) as ticks:
        result = run()
    return ticks[0, 0], result


def test_constant_weights_are_packed_once_for_a_session():
    block, x = random_block(0, 96, 6, 16), image(1, 1, 6, 7, 96)
    model = block_model(block, 1, 6, 7)
    with_inputs, weights = with_weights_as_inputs(model)
    library = plugin_path("onnxruntime")
    constant, variable = (OnnxRuntime(each, 1, library) for each in (model, with_inputs))
    none, out = ticks_of_packing(library, lambda: constant.run({"x": x})["out"])
    some, same = ticks_of_packing(library, lambda: variable.run({"x": x, **weights})["out"])
    assert some > 20 * none
    np.testing.assert_array_equal(out, same)


def test_packed_weights_keep_the_kernel_that_packed_them(isa):
    block, x = random_block(0, 24, 2, 8), image(1, 1, 5, 4, 24)
    model = block_model(block, 1, 5, 4)
    session = OnnxRuntime(model, 1, plugin_path("onnxruntime"))
    want = session.run({"x": x})["out"]
    library().evm_scan_force_isa(b"base")
    np.testing.assert_array_equal(session.run({"x": x})["out"], want)


def test_the_optional_outputs_are_what_the_scan_read_and_wrote(isa):
    block, x = random_block(1, 20, 3, 16), image(1, 2, 7, 6, 20)
    model = block_model(block, 2, 7, 6, scan_outputs=True)
    got = OnnxRuntime(model, 2, plugin_path("onnxruntime")).run({"x": x})
    seen = []
    original = EVSSBlock.forward.__globals__["ES2D"].scan

    def record(self, u):
        seen.append(u)
        return original(self, u)

    EVSSBlock.forward.__globals__["ES2D"].scan = record
    try:
        block(torch.from_numpy(x))
    finally:
        EVSSBlock.forward.__globals__["ES2D"].scan = original
    np.testing.assert_allclose(got["u"], seen[0].numpy(), atol=1e-5)
    operands = {key: value.numpy() for key, value in block.fused_op().operands.items()}
    inputs = [got["u"], got["delta"], operands["A"], got["B"], got["C"], operands["skip"], operands["dt_bias"]]
    want = reference.selective_scan(*inputs)
    assert np.abs(got["y"] - want).max() <= 3e-6 * np.abs(want).max()
    projected = got["u"].astype(np.float64) @ operands["x_proj"]
    np.testing.assert_allclose(got["delta"], projected[..., :3] @ operands["dt_proj"], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([got["B"], got["C"]], -1), projected[..., 3:], atol=1e-5)


def test_threads_do_not_change_a_bit():
    block, x = random_block(2, 48, 3, 16), image(2, 2, 49, 43, 48)
    model = block_model(block, 2, 49, 43)
    one, three = (OnnxRuntime(model, n, plugin_path("onnxruntime")).run({"x": x})["out"] for n in (1, 3))
    np.testing.assert_array_equal(one, three)


def other_body(block):
    """out = x + x."""
    names = ["x", *block.fused_op().operands]
    nodes = [helper.make_node("Add", ["x", "x"], ["out"])]
    return helper.make_function("evm", "EVSSBlock", names, ["out"], nodes, [helper.make_opsetid("", 20)])


def test_registered_the_kernel_runs_otherwise_the_body():
    block, x = random_block(3, 16, 1, 16), image(3, 1, 8, 8, 16)
    model = block_model(block, 1, 8, 8, body=other_body(block))
    np.testing.assert_array_equal(OnnxRuntime(model, 1).run({"x": x})["out"], 2 * x)
    out = OnnxRuntime(model, 1, plugin_path("onnxruntime")).run({"x": x})["out"]
    np.testing.assert_allclose(out, in_float64(block, x), atol=1e-5)


@pytest.mark.parametrize(
    ("operand", "change", "message"),
    [
        ("in_proj", lambda v: v[:, :-1], "axis 1 of in_proj is 63, expected 64"),
        ("x_proj", lambda v: v[:, :, :-1], "axis 2 of x_proj is 32, expected 33"),
        ("out_proj", lambda v: v[:, :-1], "out_proj has 15 on axis 1 (C), x asks for 16"),
        ("conv_weight", lambda v: v[..., :2], "conv_weight has 2 on axis 3 (3), the op asks for 3"),
        ("A", lambda v: v[0], "A has rank 2, expected 3"),
    ],
)
def test_wrong_operands_are_errors_not_crashes(operand, change, message):
    model = onnx.load_from_string(block_model(random_block(4, 16, 1, 16), 1, 8, 8))
    tensor = next(t for t in model.graph.initializer if t.name == operand)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), operand))
    runtime = OnnxRuntime(model.SerializeToString(), 1, plugin_path("onnxruntime"))
    with pytest.raises(BundleError) as error:
        runtime.run({"x": image(0, 1, 8, 8, 16)})
    assert message in str(error.value)


def hub(micro, **changes):
    plan = ExportPlan("onnx", imgsz=(64, 64), **changes)
    network = load_checkpoint(micro)
    plan, preprocessing = complete(plan, network.spec)
    return trace(with_pre_and_postprocessing(network, plan, preprocessing), plan, {}), plan


def test_outlining_keeps_every_bit_of_the_portable_form(micro):
    graph, _ = hub(micro)
    fused = onnx.ModelProto()
    fused.CopyFrom(graph.model)
    assert [fuse_module(fused, path, op) > 40 for path, op in graph.fusable.items()] == [True, True]
    onnx.checker.check_model(fused, full_check=True)
    pixels = {"image": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)}
    before, after = (OnnxRuntime(m.SerializeToString(), 1).run(pixels)["logits"] for m in (graph.model, fused))
    np.testing.assert_array_equal(before, after)
    assert len(fused.SerializeToString()) < 1.1 * len(graph.model.SerializeToString())


@pytest.mark.slow
def test_blocks_of_all_stages_share_one_function(checkpoint, tmp_path):
    """ONNX Runtime 1.24 runs the first function of a name, whatever the overload says."""
    bundle = export(checkpoint("tiny_224"), ExportPlan("onnx", imgsz=(64, 64)), tmp_path)
    model = onnx.load(str(bundle.path / "model.onnx"))
    assert [function.name for function in model.functions] == ["SelectiveScan", "EVSSBlock"]
    calls = [node for node in model.graph.node if node.op_type == "EVSSBlock"]
    groups = [[a.i for a in call.attribute if a.name.endswith("_group")] for call in calls]
    assert groups == [[48, 96]] * 2 + [[96, 192]] * 2
    assert model.ir_version == 9  # ONNX Runtime 1.17


def test_a_body_of_another_structure_is_an_overload(micro):
    graph, _ = hub(micro)
    fused = onnx.ModelProto()
    fused.CopyFrom(graph.model)
    first, second = graph.fusable.items()
    gate = next(n for n in fused.graph.node if n.name == f"{second[0]}.se/Sigmoid")
    fused.graph.node.insert(
        list(fused.graph.node).index(gate) + 1,
        helper.make_node("Identity", [gate.output[0]], ["same"], f"{second[0]}.se/Same"),
    )
    for node in fused.graph.node:
        if node.name.startswith(f"{second[0]}.se/") and node.op_type == "Mul":
            node.input[:] = ["same" if name == gate.output[0] else name for name in node.input]
    for path, op in (first, second):
        fuse_module(fused, path, op)
    assert [f.overload for f in fused.functions if f.name == "EVSSBlock"] == ["", second[0]]
    onnx.checker.check_model(fused, full_check=True)
    pixels = {"image": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)}
    before, after = (OnnxRuntime(m.SerializeToString(), 1).run(pixels)["logits"] for m in (graph.model, fused))
    np.testing.assert_array_equal(before, after)


def test_what_is_no_block_is_not_outlined(micro):
    graph, _ = hub(micro)
    path, op = next(iter(graph.fusable.items()))
    with pytest.raises(ToolchainError, match=r"layers\.0\.blocks\.0\.se cannot be fused: its nodes read"):
        fuse_module(graph.model, f"{path}.se", op)
    weight = next(t for t in graph.model.graph.initializer if t.name == f"{path}.norm.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
    with pytest.raises(ToolchainError, match="norm_weight is not among the constants"):
        match_constants(graph.model, path, op, {})


@pytest.mark.parametrize("imgsz", [(33, 47), (90, 70)])
@pytest.mark.slow
def test_odd_maps_and_dynamic_batch_on_the_kernel(imgsz, micro, tmp_path):
    bundle = export(micro, ExportPlan("onnx", imgsz=imgsz, batch=Batch.parse("dynamic")), tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *imgsz, 3), np.uint8)
    model, _ = load_checkpoint(micro)
    with torch.inference_mode():
        want = model(torch.from_numpy(bundle.manifest.preprocess().normalise(pixels))).numpy()
    for scan in ("plugin", "portable"):
        with load(bundle.path, scan=scan) as loaded:
            assert np.abs(loaded.run({"image": pixels})["logits"] - want).max() < 1e-4


@pytest.mark.slow
def test_golden_logits_on_the_kernel(checkpoint, tmp_path):
    for name, imgsz, batch in (("tiny_224", (224, 224), "dynamic"), ("tiny_odd_200x232", (200, 232), "1")):
        case = golden.model_case(name)
        plan = ExportPlan("onnx", imgsz=imgsz, input="tensor", batch=Batch.parse(batch))
        bundle = export(checkpoint(name), plan, tmp_path)
        with load(bundle.path, scan="plugin") as loaded:
            assert np.abs(loaded.run({"tensor": case["images"]})["logits"] - case["logits"]).max() < 2e-5


def test_normalisation_goes_into_the_first_convolution(micro):
    graph, _ = hub(micro)
    folded = onnx.ModelProto()
    folded.CopyFrom(graph.model)
    assert fold_normalisation(folded) == 1
    assert fold_normalisation(folded) == 0
    assert {n.op_type for n in graph.model.graph.node[:3]} == {"Cast", "Mul", "Add"}
    assert [n.op_type for n in folded.graph.node[:3]] == ["Cast", "Transpose", "Conv"]
    pixels = {"image": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)}
    before, after = (OnnxRuntime(m.SerializeToString(), 1).run(pixels)["logits"] for m in (graph.model, folded))
    np.testing.assert_allclose(before, after, atol=5e-6)


@pytest.mark.parametrize("change", ["padding", "second reader", "tensor input"])
@pytest.mark.slow
def test_normalisation_stays_where_folding_would_be_wrong(change, micro):
    graph, _ = hub(micro, **({"input": "tensor"} if change == "tensor input" else {}))
    model = graph.model
    if change == "padding":
        conv = next(node for node in model.graph.node if node.op_type == "Conv")
        next(a for a in conv.attribute if a.name == "pads").ints[:] = [1, 1, 1, 1]
    if change == "second reader":
        model.graph.output.append(helper.make_empty_tensor_value_info("again"))
        scaled = next(node for node in model.graph.node if node.op_type == "Mul").output[0]
        model.graph.node.append(helper.make_node("Identity", [scaled], ["again"]))
    before = model.SerializeToString(deterministic=True)
    assert fold_normalisation(model) == 0
    assert model.SerializeToString(deterministic=True) == before

"""Every lowering of the scan against the golden cases, the float64 loop, and random shapes."""

from __future__ import annotations

import golden
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from evm_deploy import plugin_path
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan import native, onnx_function, reference, unrolled
from evm_deploy.scan.op import selective_scan
from evm_deploy.scan.portable import two_level_scan

INPUTS = onnx_function.INPUTS


def in_torch(function):
    return lambda *arrays, **how: function(*(torch.from_numpy(a) for a in arrays), **how).numpy()


def scan_node(softplus=True):
    return helper.make_node("SelectiveScan", INPUTS, ["y"], domain="evm", **({} if softplus else {"delta_softplus": 0}))


def in_onnx(*arrays, delta_softplus=True):
    return OnnxRuntime(onnx_model(arrays, delta_softplus).SerializeToString(), 1).run(
        dict(zip(INPUTS, arrays, strict=True))
    )["y"]


def in_onnx_on_the_kernel(*arrays, delta_softplus=True):
    model = onnx_model(arrays, delta_softplus).SerializeToString()
    feeds = dict(zip(INPUTS, arrays, strict=True))
    return OnnxRuntime(model, 1, plugin_path("onnxruntime")).run(feeds)["y"]


def unrolled_in_onnx(*arrays, delta_softplus=True):
    model = onnx_model(arrays, delta_softplus)
    length = arrays[0].shape[2]
    nodes = unrolled.unrolled_scan({k: k for k in INPUTS}, "y", length, "scan/", softplus=delta_softplus)
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    return OnnxRuntime(model.SerializeToString(), 1).run(dict(zip(INPUTS, arrays, strict=True)))["y"]


def onnx_model(arrays, softplus):
    infos = [
        helper.make_tensor_value_info(k, TensorProto.FLOAT, [None] * a.ndim)
        for k, a in zip(INPUTS, arrays, strict=True)
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    model = helper.make_model(
        helper.make_graph([scan_node(softplus)], "scan", infos, [output]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("evm", 1)],
        ir_version=10,
    )
    onnx_function.add_functions(model, 20)
    onnx_function.register_schema()
    onnx.checker.check_model(model, full_check=True)
    return model


def standard_nodes(L):
    """TensorRT's form: no function, L static."""
    return unrolled.unrolled_scan({name: name for name in INPUTS}, "y", L, "scan/"), []


def one_node_and_its_function(L):
    return [scan_node()], [onnx_function.selective_scan_function(20)]


def eager_without_kernel(*arrays, **how):
    with native.without_native_scan():
        return in_torch(selective_scan)(*arrays, **how)


FORMS = {
    "eager": in_torch(selective_scan),
    "eager_without_kernel": eager_without_kernel,
    "two_level": in_torch(two_level_scan),
    "onnx": in_onnx,
    "kernel": in_onnx_on_the_kernel,
    "unrolled": unrolled_in_onnx,
}


@pytest.mark.parametrize("case", golden.SCAN_CASES)
def test_the_float64_loop_is_the_golden_one(case):
    inputs, expected = golden.scan_case(case)
    y = golden.channels_first(reference.selective_scan(*golden.channels_last(inputs)))
    for key, value in golden.scan_summary(y).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", golden.SCAN_CASES)
def test_lowering_matches_golden(case, form):
    inputs, expected = golden.scan_case(case)
    got = golden.scan_summary(golden.channels_first(FORMS[form](*golden.channels_last(inputs))))
    for key in ("y_head", "y_tail"):
        assert np.abs(got[key] - expected[key]).max() / expected["stats"][2] < 1e-5


def random_inputs(seed, b, K, L, D, N, dt):
    g = np.random.default_rng(seed)
    delta = dt + np.log(-np.expm1(-dt)) * np.ones((b, K, L, D))
    arrays = (
        g.standard_normal((b, K, L, D)),
        delta + 0.1 * g.standard_normal((b, K, L, D)),
        -g.uniform(0.1, 16, (K, D, N)),
        g.standard_normal((b, K, L, N)),
        g.standard_normal((b, K, L, N)),
        g.standard_normal((K, D)),
        np.zeros((K, D)),
    )
    return [a.astype(np.float32) for a in arrays]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    b=st.integers(1, 3),
    K=st.integers(1, 4),
    L=st.integers(1, 40),
    D=st.integers(1, 9),
    N=st.integers(1, 17),
    dt=st.sampled_from([1e-4, 0.05, 1.0, 20.0]),
)
def test_any_shape_and_delta(seed, b, K, L, D, N, dt):
    inputs = random_inputs(seed, b, K, L, D, N, dt)
    want = reference.selective_scan(*inputs)
    for name, form in FORMS.items():
        y = form(*inputs)
        assert np.isfinite(y).all(), name
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max(), name


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    L=st.integers(1, 40),
    D=st.integers(1, 9),
    N=st.sampled_from([1, 2, 16]),
    dt=st.sampled_from([1e-6, 1e-3, 0.05, 20.0]),
)
def test_without_softplus_delta_is_dt(seed, L, D, N, dt):
    inputs = random_inputs(seed, 2, 3, L, D, N, 1.0)
    inputs[1] = (dt * np.random.default_rng(seed).uniform(0.5, 2, inputs[1].shape)).astype(np.float32)
    want = reference.selective_scan(*inputs, delta_softplus=False)
    skipped = inputs[5][:, None] * inputs[0]
    for name, form in FORMS.items():
        y = form(*inputs, delta_softplus=False)
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max(), name
        ssm = np.abs(want - skipped).max()
        assert np.abs(y - want).max() <= 2e-5 * ssm + 5e-7 * np.abs(skipped).max(), name


@pytest.mark.parametrize("case", golden.SCAN_CASES)
def test_without_softplus_golden_scans_with_dt_are_the_same(case):
    inputs, _ = golden.scan_case(case)
    inputs = list(golden.channels_last(inputs))
    want = reference.selective_scan(*inputs)
    dt = reference.softplus(inputs[1].astype(np.float64) + inputs[6][:, None]).astype(np.float32)
    for name, form in FORMS.items():
        y = form(inputs[0], dt, *inputs[2:6], np.zeros_like(inputs[6]), delta_softplus=False)
        assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max(), name


def test_the_same_dt_before_softplus():
    inputs = dict(zip(INPUTS, random_inputs(1, 1, 2, 9, 3, 4, 0.3), strict=True))
    inputs["delta"] = np.abs(inputs["delta"])
    plain = {**inputs, "delta_softplus": np.array(False)}
    same = reference.with_softplus(plain)
    assert set(same) == set(INPUTS) and reference.with_softplus(same) == same
    want = reference.selective_scan(**plain)
    assert np.abs(reference.selective_scan(**same) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("plugin", [False, True])
def test_scans_of_both_kinds_in_one_model(plugin):
    """The body of the scans without softplus is an overload; without it ONNX Runtime would call the first body."""
    arrays = dict(zip(INPUTS, random_inputs(5, 1, 2, 9, 3, 4, 1.0), strict=True))
    arrays["delta"] = np.abs(arrays["delta"])
    model = onnx_model(list(arrays.values()), True)
    del model.functions[:]
    second = scan_node(softplus=False)
    second.output[0] = "z"
    model.graph.node.append(second)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [None] * 4))
    onnx_function.add_functions(model, 20)
    onnx.checker.check_model(model, full_check=True)
    have = OnnxRuntime(model.SerializeToString(), 1, plugin_path("onnxruntime") if plugin else None).run(arrays)
    for name, softplus in (("y", True), ("z", False)):
        want = reference.selective_scan(**arrays, delta_softplus=softplus)
        assert np.abs(have[name] - want).max() <= 1e-5 * np.abs(want).max(), name


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("form", [one_node_and_its_function, standard_nodes])
@pytest.mark.parametrize(("K", "L", "D", "N"), [(2, 19, 8, 16), (1, 50, 32, 16), (4, 64, 48, 1)])
def test_scans_behind_transposes_at_every_level(K, L, D, N, form, level):
    """Channels-first callers transpose what a scan reads; ONNX Runtime moves these Transposes through what follows."""
    arrays = dict(zip(INPUTS, random_inputs(4, 2, K, L, D, N, 0.05), strict=True))
    moved = {name for name in INPUTS if arrays[name].ndim == 4}
    feeds = {f"{k}_first" if k in moved else k: a.swapaxes(2, 3) if k in moved else a for k, a in arrays.items()}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, a.shape) for name, a in feeds.items()]
    output = helper.make_tensor_value_info("y_first", TensorProto.FLOAT, (2, K, D, L))
    scan, functions = form(L)
    transposes = [helper.make_node("Transpose", [f"{name}_first"], [name], perm=[0, 1, 3, 2]) for name in sorted(moved)]
    back = helper.make_node("Transpose", ["y"], ["y_first"], perm=[0, 1, 3, 2])
    model = helper.make_model(
        helper.make_graph([*transposes, *scan, back], "first", infos, [output]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("evm", 1)],
        ir_version=10,
        functions=functions,
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, feeds)
    want = reference.selective_scan(*arrays.values()).swapaxes(2, 3)
    assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()


def test_no_nan_at_the_edge():
    inputs = random_inputs(0, 1, 4, 200, 8, 16, 20.0)
    inputs[2][:] = -16
    for name, form in FORMS.items():
        assert np.isfinite(form(*inputs)).all(), name


def test_eager_runs_on_the_native_kernel_where_it_can(monkeypatch):
    inputs = [torch.from_numpy(a) for a in random_inputs(0, 2, 4, 33, 20, 16, 0.3)]
    kernel = native.native_kernel(inputs)
    assert kernel is not None
    assert native.native_kernel([x.double() for x in inputs]) is None
    with native.without_native_scan():
        assert native.native_kernel(inputs) is None
    calls = []
    monkeypatch.setattr(
        "evm_deploy.scan.op.run_native_scan", lambda kernel, x, softplus: calls.append(kernel) or x[0].clone()
    )
    selective_scan(*inputs)
    assert calls == [kernel]
    monkeypatch.setattr(native, "find_plugin", lambda runtime: None)
    assert native.native_kernel(inputs) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_eager_takes_strided_tensors_and_any_number_of_threads(threads):
    inputs = [torch.from_numpy(a) for a in random_inputs(0, 2, 4, 33, 40, 16, 0.3)]
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(selective_scan(*strided), selective_scan(*inputs), rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_the_op_passes_torchs_own_checks():
    inputs = [torch.from_numpy(a).requires_grad_() for a in random_inputs(1, 1, 2, 9, 3, 4, 0.3)]
    torch.library.opcheck(selective_scan, inputs)


def test_gradients_are_those_of_the_recurrence():
    inputs = [torch.from_numpy(a).double().requires_grad_() for a in random_inputs(2, 1, 2, 6, 2, 3, 0.3)]
    assert torch.autograd.gradcheck(selective_scan, inputs)
    inputs[1] = (inputs[1].detach().abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=False), inputs)


@pytest.mark.parametrize(("index", "name"), [(1, "delta"), (3, "B"), (5, "skip")])
def test_wrong_shapes_are_named(index, name):
    inputs = [torch.from_numpy(a) for a in random_inputs(3, 1, 2, 6, 2, 3, 0.3)]
    inputs[index] = inputs[index][..., :1]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        selective_scan(*inputs)

"""The native scan: every instruction set of this CPU against the float64 loop, and the library inside ONNX Runtime."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from evm_deploy import cli, plugin_path
from evm_deploy.bundle.loaded import load
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.export.pipeline import export
from evm_deploy.export.plan import ExportPlan
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.scan import onnx_function, reference
from evm_deploy.toolchain import plugins
from evm_deploy.toolchain.compile import read_recipe

FLOATS = ctypes.POINTER(ctypes.c_float)


class Arguments(ctypes.Structure):
    _fields_ = [(name, FLOATS) for name in (*onnx_function.INPUTS, "y")]
    _fields_ += [(name, ctypes.c_int64) for name in ("b", "K", "L", "D", "N", "no_softplus")]


def library():
    return opened(plugin_path("onnxruntime"))


def opened(path):
    lib = ctypes.CDLL(str(path))
    lib.evm_scan_num_tiles.restype = ctypes.c_int64
    lib.evm_scan_run_tile.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return lib


def isas():
    """Return the instruction sets that this CPU runs; the best is among them."""
    lib = library()
    names = dict.fromkeys(kernel.name for kernel in read_recipe().kernels)
    found = [isa for isa in names if lib.evm_scan_force_isa(isa.encode())]
    lib.evm_scan_force_isa(None)
    return found


@pytest.fixture(params=isas())
def scan(request):
    """scan(*inputs) -> y on one instruction set. Canaries around y catch writes outside of it."""
    lib = library()
    assert lib.evm_scan_force_isa(request.param.encode())
    yield lambda *arrays, **how: run_scan(lib, arrays, **how)
    lib.evm_scan_force_isa(None)


def run_scan(lib, arrays, softplus=True):
    arrays = [np.ascontiguousarray(a, np.float32) for a in arrays]
    shape, size = arrays[0].shape, arrays[0].size
    padded = np.full(size + 64, 123.0, np.float32)
    y = padded[32 : 32 + size]
    y[:] = np.nan
    pointers = [a.ctypes.data_as(FLOATS) for a in (*arrays, y)]
    arguments = Arguments(*pointers, *shape, arrays[2].shape[2], not softplus)
    for tile in range(lib.evm_scan_num_tiles(ctypes.byref(arguments))):
        lib.evm_scan_run_tile(ctypes.addressof(arguments), tile)
    assert (padded[:32] == 123).all() and (padded[32 + size :] == 123).all()
    return y.reshape(shape)


def random_scan(seed, b, K, L, D, N, spread=3.0):
    g = np.random.default_rng(seed)
    shapes = ((b, K, L, D), (b, K, L, D), (K, D, N), (b, K, L, N), (b, K, L, N), (K, D), (K, D))
    arrays = [g.standard_normal(shape).astype(np.float32) for shape in shapes]
    arrays[1] *= spread
    arrays[2] = -np.exp(arrays[2])
    return arrays


def magnitudes(u, delta, A, B, C, skip, bias):
    """The same scan with no cancellation: its outputs are the sizes of the terms that y sums up."""
    return np.abs(u), delta, A, np.abs(B), np.abs(C), np.abs(skip), bias


@pytest.mark.parametrize("case", golden.SCAN_CASES)
def test_golden_cases(case, scan):
    inputs, expected = golden.scan_case(case)
    got = golden.scan_summary(golden.channels_first(scan(*golden.channels_last(inputs))))
    for key in ("y_head", "y_tail"):
        assert np.abs(got[key] - expected[key]).max() / expected["stats"][2] < 3e-6


def test_any_shape(scan):
    @settings(max_examples=60, deadline=None, database=None)
    @given(
        st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 40),
        st.integers(1, 140), st.sampled_from([0.1, 3.0, 30.0]),
    )  # fmt: skip
    def check(seed, b, K, L, D, N, spread):
        inputs = random_scan(seed, b, K, L, D, N, spread)
        want, terms = reference.selective_scan(*inputs), reference.selective_scan(*magnitudes(*inputs))
        assert np.abs(scan(*inputs) - want).max() <= 3e-6 * terms.max()

    check()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 3, 15), (1, 2, 4, 48), (1, 1, 33, 70), (2, 3, 70, 97)])
@pytest.mark.parametrize("states", [1, 2, 3, 4, 8, 65, 66])
def test_few_states(sizes, states, scan):
    """N = 1 and 2 have a loop of their own; 65 and 66 leave so many for the last group. dt is up to 20 and more."""
    for spread in (0.1, 1.0, 10.0):
        inputs = random_scan(1, *(*sizes, states), spread=spread)
        want, terms = reference.selective_scan(*inputs), reference.selective_scan(*magnitudes(*inputs))
        assert np.abs(scan(*inputs) - want).max() <= 3e-6 * terms.max()


@pytest.mark.parametrize("states", [1, 2, 16])
@pytest.mark.parametrize("name", onnx_function.INPUTS)
def test_a_nan_reaches_what_it_must_and_nothing_else(name, states, scan):
    inputs = random_scan(2, 1, 2, 9, 50, states)
    spoilt = inputs[onnx_function.INPUTS.index(name)]
    spoilt.reshape(-1)[spoilt.size // 2] = np.nan
    want = reference.selective_scan(*inputs)
    assert 0 < np.isnan(want).sum() < want.size
    np.testing.assert_array_equal(np.isnan(scan(*inputs)), np.isnan(want))


@pytest.mark.parametrize("sizes", [(2, 3, 33, 50, 16), (1, 1, 70, 7, 1), (1, 2, 5, 20, 100)])
def test_without_softplus_delta_is_dt(sizes, scan):
    inputs = random_scan(0, *sizes)
    inputs[1], inputs[6] = np.abs(inputs[1]) * np.float32(0.01), np.zeros_like(inputs[6])
    want = reference.selective_scan(*inputs, delta_softplus=False)
    terms = reference.selective_scan(*magnitudes(*inputs), delta_softplus=False)
    assert np.abs(scan(*inputs, softplus=False) - want).max() <= 3e-6 * terms.max()
    assert np.abs(scan(*inputs) - want).max() > 1e-2 * terms.max()


def test_empty_sequences_have_no_tiles():
    arguments = Arguments(*[None] * 8, 2, 4, 0, 16, 16, 0)
    assert library().evm_scan_num_tiles(ctypes.byref(arguments)) == 0


def test_an_unknown_isa_changes_nothing():
    lib, before = library(), plugins.kernel_isa(plugin_path("onnxruntime"))
    assert not lib.evm_scan_force_isa(b"mmx")
    assert plugins.kernel_isa(plugin_path("onnxruntime")) == before == isas()[-1]


def scan_model(*functions, **attributes):
    ranks = dict(zip(onnx_function.INPUTS, (4, 4, 3, 4, 4, 2, 2), strict=True))
    infos = [helper.make_tensor_value_info(k, TensorProto.FLOAT, [None] * rank) for k, rank in ranks.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)
    node = helper.make_node("SelectiveScan", onnx_function.INPUTS, ["y"], domain="evm", **attributes)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("evm", 1)]
    graph = helper.make_graph([node], "scan", infos, [output])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions).SerializeToString()


def double():
    """A deliberately different body: y = 2 u."""
    nodes = [helper.make_node("Add", ["u", "u"], ["y"])]
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_function("evm", "SelectiveScan", onnx_function.INPUTS, ["y"], nodes, opsets)


def test_registered_the_kernel_runs_otherwise_the_body():
    inputs = random_scan(0, 1, 4, 9, 5, 16)
    feeds = dict(zip(onnx_function.INPUTS, inputs, strict=True))
    body = OnnxRuntime(scan_model(double()), 1).run(feeds)["y"]
    kernel = OnnxRuntime(scan_model(double()), 1, plugin_path("onnxruntime")).run(feeds)["y"]
    np.testing.assert_array_equal(body, 2 * inputs[0])
    np.testing.assert_allclose(kernel, reference.selective_scan(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (1, lambda a: a[:, :, :-1], "delta has 8 on axis 2 (L), u asks for 9"),
        (3, lambda a: a[..., :8], "B has 8 on axis 3 (N), A asks for 16"),
        (5, lambda a: a[:2], "skip has 2 on axis 0 (K), u asks for 4"),
    ],
)
def test_wrong_shapes_are_errors_not_crashes(index, change, message):
    inputs = random_scan(0, 1, 4, 9, 5, 16)
    inputs[index] = np.ascontiguousarray(change(inputs[index]))
    runtime = OnnxRuntime(scan_model(double()), 1, plugin_path("onnxruntime"))
    with pytest.raises(BundleError, match=re.escape(message)):
        runtime.run(dict(zip(onnx_function.INPUTS, inputs, strict=True)))


def test_threads_agree_bit_for_bit(micro_bundle):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    with load(micro_bundle.path, threads=1) as one, load(micro_bundle.path, threads=2) as two:
        want = one.run({"image": pixels})["logits"]
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda i: (one, two)[i % 2].run({"image": pixels})["logits"], range(40)):
                np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow(micro_bundle):
    """reliability/load.py does this a million times."""

    def resident_kb():
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    with load(micro_bundle.path, threads=1, scan="plugin") as model:
        for _ in range(200):
            model.run({"image": pixels})
        before = resident_kb()
        for _ in range(2000):
            model.run({"image": pixels})
        assert resident_kb() - before < 1000


@pytest.mark.parametrize("scan", ["plugin", "portable"])
def test_selftest_passes_in_both_modes(scan, micro_bundle, capsys):
    assert cli.run_main([str(micro_bundle.path), "--selftest", "--scan", scan]) == 0
    assert f"scans ran as {scan}" in capsys.readouterr().out


def test_export_verifies_both_modes(micro_bundle):
    assert {scan["lowering"] for scan in micro_bundle.manifest.parity["scans"]} == {"portable", "plugin"}


def test_plain_onnxruntime_takes_the_library(micro_bundle):
    code = (
        "import sys, onnxruntime as ort; o = ort.SessionOptions(); o.register_custom_ops_library(sys.argv[1]); "
        "ort.InferenceSession(sys.argv[2], o, providers=['CPUExecutionProvider']); print('evm_deploy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(plugin_path("onnxruntime")), str(micro_bundle.path / "model.onnx")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_without_the_library_everything_works_and_says_so(monkeypatch, micro, micro_bundle, tmp_path, capsys):
    monkeypatch.setattr(plugins, "find_plugin", lambda runtime: None)
    with load(micro_bundle.path) as bundle:
        assert (bundle.scan.value, "not built" in bundle.scan.reason) == ("portable", True)
        assert all(check.ok for check in bundle.selftest())
    Image.new("RGB", (70, 50)).save(tmp_path / "a.png")
    assert cli.run_main([str(micro_bundle.path), str(tmp_path / "a.png")]) == 0
    assert "portable form: the native scan was not built" in capsys.readouterr().err
    bundle = export(micro, ExportPlan("onnx", imgsz=(32, 32)), tmp_path)
    assert {scan["lowering"] for scan in bundle.manifest.parity["scans"]} == {"portable"}
    with pytest.raises(ToolchainError, match=r"not built(?s:.*)g\+\+"):
        load(micro_bundle.path, scan="plugin")
    with pytest.raises(ToolchainError, match="not built"):
        plugin_path("onnxruntime")


def test_a_portable_bundle_has_no_node_for_the_kernel(micro, tmp_path):
    bundle = export(micro, ExportPlan("onnx", imgsz=(32, 32), scan="portable"), tmp_path)
    assert load(bundle.path).scan.value == "portable"
    with pytest.raises(UsageError, match="exported with portable scans"):
        load(bundle.path, scan="plugin")


def test_a_damaged_library_is_an_error(tmp_path, micro_bundle):
    broken = tmp_path / "evm_onnxruntime.so"
    broken.write_bytes(b"not a library")
    model = onnx.load(str(micro_bundle.path / "model.onnx")).SerializeToString()
    with pytest.raises(ToolchainError, match="refuses"):
        OnnxRuntime(model, 1, broken)


REGISTER = """
import ctypes, sys

made, added = [], []
NOTHING = ctypes.c_void_p

@ctypes.CFUNCTYPE(NOTHING, ctypes.c_char_p, ctypes.POINTER(NOTHING))
def create(name, domain):
    made.append(name)
    domain[0] = 1000 + len(made)

@ctypes.CFUNCTYPE(NOTHING, NOTHING, NOTHING)
def add(options, domain):
    added.append(domain)

class Base(ctypes.Structure):
    _fields_ = [("get", ctypes.CFUNCTYPE(NOTHING, ctypes.c_uint32))]

table = (NOTHING * 300)()
table[26], table[27], table[28] = (ctypes.cast(each, NOTHING) for each in (create, add, add))
bases = [Base(Base._fields_[0][1](lambda version: ctypes.addressof(table))) for _ in range(2)]
register = ctypes.CDLL(sys.argv[1]).RegisterCustomOps
for base in (0, 0, 0, 1, 1):
    assert register(NOTHING(7), ctypes.byref(bases[base])) == 0
print(made, added)
"""


def test_sessions_share_a_domain():
    """Sessions share a domain, because nobody releases one; another ONNX Runtime in the process has its own."""
    command = [sys.executable, "-c", REGISTER, str(plugin_path("onnxruntime"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    handles = re.findall(r"\d+", said)
    assert handles.count("1001") == 3 and handles.count("1002") == 2 and said.count("b'evm'") == 2

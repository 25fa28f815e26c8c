"""The extension for OpenVINO: how it is built and found, what it computes, what it refuses."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from evm_deploy import plugin_path
from evm_deploy.errors import ToolchainError
from evm_deploy.export.openvino.ir import save
from evm_deploy.runtimes.openvino import open_core
from evm_deploy.scan import onnx_function, reference
from evm_deploy.toolchain import openvino_extension
from evm_deploy.toolchain.openvino_extension import cached_path, extension, installed_release, isa, release_of
from tests.test_fused import block_model, image, in_float64, random_block, ticks_of_packing, with_weights_as_inputs
from tests.test_native import double, isas, magnitudes, random_scan, scan_model

pytestmark = pytest.mark.compiler

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(scope="module")
def core():
    return open_core(extension())


def run(core, model, feeds, threads=1):
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    return compiled(feeds)[0]


# ---------------------------------------------------------------------------------------------------- what it computes


@pytest.fixture(params=isas())
def kernel(request, core):
    library = ctypes.CDLL(str(extension()))
    assert library.evm_scan_force_isa(request.param.encode())
    assert isa(extension()) == request.param
    yield
    library.evm_scan_force_isa(None)


@pytest.mark.parametrize("sizes", [(1, 4, 9, 5, 16), (2, 3, 33, 50, 7), (3, 1, 1, 1, 1)])
def test_a_scan(sizes, kernel, core):
    """The model's function computes something else: it is the extension that runs."""
    inputs = random_scan(0, *sizes)
    y = run(core, scan_model(double()), dict(zip(onnx_function.INPUTS, inputs, strict=True)), threads=2)
    terms = reference.selective_scan(*magnitudes(*inputs))
    assert np.abs(y - reference.selective_scan(*inputs)).max() <= 3e-6 * terms.max()


@pytest.mark.parametrize("softplus", [True, False])
def test_an_ir_keeps_the_attribute_that_is_not_the_default(softplus, core, tmp_path):
    inputs = random_scan(0, 1, 2, 9, 5, 1)
    inputs[1] = np.abs(inputs[1])
    model = core.read_model(scan_model(double(), **({} if softplus else {"delta_softplus": 0})))
    save(model, tmp_path / "scan.xml")
    assert ("delta_softplus" in (tmp_path / "scan.xml").read_text()) is not softplus
    y = run(core, tmp_path / "scan.xml", dict(zip(onnx_function.INPUTS, inputs, strict=True)))
    want = reference.selective_scan(*inputs, delta_softplus=softplus)
    assert np.abs(y - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("b, H, W, dim", [(1, 7, 6, 20), (2, 5, 9, 33), (3, 1, 1, 8)])
def test_a_block(b, H, W, dim, kernel, core):
    block, x = random_block(1, dim, 3, 16), image(1, b, H, W, dim)
    want = in_float64(block, x)
    assert np.abs(run(core, block_model(block, b, H, W), {"x": x}, threads=2) - want).max() <= 1e-5 * np.abs(want).max()


def test_constant_weights_are_packed_once_for_a_compiled_model(core):
    block, x = random_block(0, 96, 6, 16), image(1, 1, 6, 7, 96)
    model = block_model(block, 1, 6, 7)
    with_inputs, weights = with_weights_as_inputs(model)

    def compiled(onnx_model, feeds):
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        network = core.compile_model(core.read_model(onnx_model), "CPU", settings)
        return lambda: network(feeds)[0]

    none, out = ticks_of_packing(extension(), compiled(model, {"x": x}))
    some, same = ticks_of_packing(extension(), compiled(with_inputs, {"x": x, **weights}))
    assert some > 20 * none
    np.testing.assert_array_equal(out, same)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (1, lambda a: a[:, :, :-1], "delta has 8 on axis 2 (L), u asks for 9"),
        (3, lambda a: a[..., :8], "B has 8 on axis 3 (N), A asks for 16"),
        (5, lambda a: a[:2], "skip has 2 on axis 0 (K), u asks for 4"),
        (5, lambda a: a[0], "skip has rank 1, expected 2"),
    ],
)
def test_wrong_shapes_are_errors_not_crashes(index, change, message, core):
    """Dynamic shapes: found when it runs. Static ones: when the model is read.

    With one thread OpenVINO 2026.4.1 loses errors of dynamic shapes on its way: it gives nothing, or crashes.
    """
    inputs = random_scan(0, 1, 4, 9, 5, 16)
    inputs[index] = np.ascontiguousarray(change(inputs[index]))
    if "rank" not in message and CPUS > 1:  # wrong ranks OpenVINO itself refuses
        feeds = dict(zip(onnx_function.INPUTS, inputs, strict=True))
        with pytest.raises(RuntimeError, match=re.escape(message)):
            run(core, scan_model(double()), feeds, threads=2)
    model = onnx.load_from_string(scan_model(double()))
    for value, array in zip(list(model.graph.input), inputs, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        core.read_model(model.SerializeToString())


# ----------------------------------------------------------------------------------------------------- how it is built


def test_it_is_compiled_once_and_can_be_moved(core):
    library = extension()
    assert plugin_path("openvino") == library == cached_path()
    assert release_of(library) == installed_release()
    content = library.read_bytes()
    assert len(content) < 1_000_000
    for place in (str(library.parents[3]), str(Path(openvino_extension.__file__).parent), "site-packages"):
        assert place.encode() not in content
    if content[:4] == b"\x7fELF":
        assert b"$ORIGIN" in content


def test_another_release_or_other_sources_are_another_library(monkeypatch):
    here = cached_path()
    monkeypatch.setattr(openvino_extension, "installed_release", lambda: "2027.0.0")
    assert cached_path() != here


def test_a_library_for_another_release_names_both(tmp_path):
    release = installed_release().encode()
    other = tmp_path / extension().name
    other.write_bytes(extension().read_bytes().replace(b"OpenVINO " + release, b"OpenVINO 1999" + release[4:]))
    message = rf"compiled for OpenVINO 1999\S+, but OpenVINO {re.escape(release.decode())} is installed"
    with pytest.raises(ToolchainError, match=message):
        open_core(other)
    with pytest.raises(ToolchainError, match=message):
        isa(other)


def test_what_is_no_extension_of_ours(tmp_path):
    with pytest.raises(ToolchainError, match="cannot be read"):
        open_core(tmp_path / "missing.so")
    with pytest.raises(ToolchainError, match="is not an OpenVINO extension of evm-deploy"):
        open_core(plugin_path("onnxruntime"))


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ToolchainError, match=r"could not be compiled(?s:.*)install g\+\+"):
        extension()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".so"]


def test_without_cmake_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(openvino_extension.shutil, "which", lambda name, path: None)
    with pytest.raises(ToolchainError, match=r"CMake is not installed(?s:.*)pip install .*\[openvino\]"):
        extension()


def test_without_openvino_it_says_so(monkeypatch):
    monkeypatch.setattr(openvino_extension, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"openvino is not installed(?s:.*)pip install .*\[run-openvino\]"):
        extension()

"""The CUDA kernel, without a GPU: emulated against the float64 loop, compiled for every architecture."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.runtimes.tensorrt import kernel
from evm_deploy.scan import reference
from tests.cache import once
from tests.test_native import magnitudes, random_scan
from tests.toolchains import need, tensorrt_headers

NATIVE = Path(__file__).parents[1] / "native"
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "110", "120", "121")
EDGES = [(1, 1, 1, 1, 1), (2, 3, 17, 9, 16), (1, 4, 16, 8, 15), (1, 2, 33, 7, 3), (3, 1, 48, 16, 16), (1, 1, 31, 1, 16)]


def emulator(folder, *flags):
    path = folder / "emulator.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", *flags, "-o", path]
    subprocess.run([*command, NATIVE / "tests" / "cuda_emulator.cpp"], check=True)
    return path


@pytest.fixture(scope="module")
def emulated(shared_folder):
    need("g++")
    return ctypes.CDLL(str(once(shared_folder / "emulator", emulator) / "emulator.so"))


def run(library, arrays, dtype=np.float32, backwards=False, softplus=True):
    """y of the kernel, launched as an engine launches it. NaN around y shows writes outside of it."""
    (batch, K, L, D), N = arrays[0].shape, arrays[2].shape[2]
    kinds = (dtype, dtype, np.float32, dtype, dtype, np.float32, np.float32)
    held = [np.ascontiguousarray(a, kind) for a, kind in zip(arrays, kinds, strict=True)]
    y = np.full(arrays[0].size + 64, np.nan, dtype)
    grid = np.array(kernel.grid(batch, K, D), np.int32)
    library.evm_emulate(
        *(ctypes.c_void_p(a.ctypes.data) for a in held), L, D, N, ctypes.c_void_p(y.ctypes.data + 32 * y.itemsize),
        int(dtype == np.float16), ctypes.c_void_p(grid.ctypes.data), kernel.THREADS, int(backwards),
        int(not softplus),
    )  # fmt: skip
    assert np.isnan(y[:32]).all() and np.isnan(y[-32:]).all()
    return y[32:-32].reshape(arrays[0].shape)


def error(library, arrays, **how):
    """Against the float64 loop, relative to the terms that y sums up."""
    want, terms = reference.selective_scan(*arrays), reference.selective_scan(*magnitudes(*arrays))
    return np.abs(run(library, arrays, **how) - want).max() / terms.max()


def problems(count):
    g = np.random.default_rng(3)
    sizes = [*EDGES, *(tuple(int(g.integers(1, high + 1)) for high in (2, 4, 60, 20, 16)) for _ in range(count))]
    return [random_scan(i, *size, spread=(0.1, 3.0, 30.0)[i % 3]) for i, size in enumerate(sizes)]


@pytest.mark.compiler
def test_any_shape(emulated):
    for arrays in problems(60):
        for backwards in (False, True):
            assert error(emulated, arrays, backwards=backwards) <= 2e-6, arrays[0].shape


@pytest.mark.compiler
def test_the_networks_scans(emulated):
    """The first stage of T at 224: 49 tiles."""
    assert error(emulated, random_scan(0, 1, 4, 784, 96, 16)) <= 2e-6


@pytest.mark.compiler
def test_without_softplus_delta_is_dt(emulated):
    for arrays in problems(10):
        arrays[1], arrays[6] = np.abs(arrays[1]) * np.float32(0.01), np.abs(arrays[6])
        want = reference.selective_scan(*arrays, delta_softplus=False)
        terms = reference.selective_scan(*magnitudes(*arrays), delta_softplus=False)
        assert np.abs(run(emulated, arrays, softplus=False) - want).max() <= 2e-6 * terms.max(), arrays[0].shape


@pytest.mark.compiler
def test_half_in_and_out_rounds_the_output_alone(emulated):
    for arrays in problems(20):
        halves = [a if i in (2, 5, 6) else a.astype(np.float16) for i, a in enumerate(arrays)]
        assert error(emulated, halves, dtype=np.float16) <= 6e-4


@pytest.mark.compiler
def test_a_kernel_without_barriers_is_wrong(tmp_path):
    """Negative control: the emulator notices, in one of the two orders."""
    need("g++")
    broken = ctypes.CDLL(str(emulator(tmp_path, "-DEVM_WITHOUT_BARRIERS")))
    arrays = random_scan(0, 1, 2, 40, 8, 16)
    assert max(np.nan_to_num(error(broken, arrays, backwards=order), nan=1.0) for order in (False, True)) > 1e-2


def test_geometry_is_that_of_the_header():
    found = dict(re.findall(r"constexpr int k(\w+) = (\d+);", (NATIVE / "tensorrt" / "selective_scan.h").read_text()))
    own = (kernel.CHANNELS, kernel.MAX_STATES, kernel.THREADS)
    assert tuple(int(found[name]) for name in ("Channels", "States", "Threads")) == own


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_with_no_spills(architecture, tmp_path):
    need("nvcc")
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-o", tmp_path / "k.cubin"]
    done = subprocess.run([*command, NATIVE / "tensorrt" / "selective_scan.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr) == [("0", "0")] * 4
    assert max(map(int, re.findall(r"Used (\d+) registers", done.stderr))) <= 64


@pytest.mark.compiler
def test_the_cpp_plugin_compiles(tmp_path):
    need("nvcc", "TensorRT's headers")
    sources = [NATIVE / "tensorrt" / name for name in ("plugin.cu", "selective_scan.cu")]
    library = tmp_path / "libevm_tensorrt.so"
    flags = ["-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-arch=sm_87", "-I", tensorrt_headers()]
    subprocess.run(["nvcc", *flags, *sources, "-o", library], check=True)
    assert ctypes.CDLL(str(library)).getCreators


def test_limits_and_errors(monkeypatch):
    kernel.check_scan(1, 4, 96, 16)
    with pytest.raises(UsageError, match="up to 16 states, but the scan has 17"):
        kernel.check_scan(1, 4, 96, 17)
    with pytest.raises(UsageError, match="batch and K up to 65535"):
        kernel.check_scan(70000, 4, 96, 16)
    with pytest.raises(UsageError, match="is not a GPU architecture"):
        kernel.compile_kernel("orin")
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    with pytest.raises(ToolchainError, match="nvcc is not installed"):
        kernel.compile_kernel("sm_87")

"""benchmarks/gpu.py without a GPU: its steps on the emulated kernel, and the launcher under nvcc."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cache import once
from tests.test_tensorrt_kernel import emulator
from tests.toolchains import need

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"

pytestmark = pytest.mark.compiler


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return pytest.importorskip("gpu")


@pytest.fixture(scope="module")
def emulated(shared_folder):
    need("g++")
    return ctypes.CDLL(str(once(shared_folder / "emulator", emulator) / "emulator.so"))


def test_the_kernel_and_the_times_of_scans(gpu, emulated, capsys):
    made = gpu.Gpu(emulated, emulated=True)
    assert gpu.check_kernel(made)
    made.seen.clear()
    gpu.measure_scans(made, [(1, 2, 20, 9, 4)], rounds=2)
    assert set(made.seen) == {(1, 2, 20, 9, 4)}
    printed = capsys.readouterr().out
    assert "| float16 | " in printed and "| (1, 2, 20, 9, 4) | float32 | " in printed


def test_a_wrong_kernel_is_found(gpu, tmp_path, capsys):
    """Negative control: without barriers the results are wrong."""
    need("g++")
    assert not gpu.check_kernel(gpu.Gpu(ctypes.CDLL(str(emulator(tmp_path, "-DEVM_WITHOUT_BARRIERS"))), emulated=True))


def test_the_bytes_of_a_scan(gpu):
    """u, delta and y, B and C in float16; A, skip and bias in float32."""
    assert gpu.scan_bytes((2, 4, 10, 8, 16), 2) == 2 * (3 * 640 + 2 * 1280) + 4 * (4 * 8 * 18)


@pytest.mark.slow
def test_every_step_on_the_cpu():
    """In its own process: the script replaces the op's kernel."""
    need("g++")
    done = subprocess.run([sys.executable, SCRIPT, "--emulate"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\nPASSED\n"), done.stderr
    assert "EMULATED" in done.stdout and "| micro | 1 | " in done.stdout
    (error,) = (float(line.split("|")[-2]) for line in done.stdout.splitlines() if line.startswith("| micro | 1 |"))
    assert 0 < error < 0.02  # float16, not float32


@pytest.mark.slow
def test_out_of_time_is_a_failure():
    need("g++")
    done = subprocess.run([sys.executable, SCRIPT, "--emulate", "--limit-s", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and "networks left out: " in done.stderr and done.stdout.endswith("\nFAILED\n")


def test_the_launcher_compiles(tmp_path):
    need("nvcc")
    source, library = ROOT / "native" / "tests" / "cuda_launch.cu", tmp_path / "launch.so"
    flags = ["-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-arch=sm_87", "-Werror", "all-warnings"]
    subprocess.run(["nvcc", *flags, source, "-o", library], check=True)
    assert ctypes.CDLL(str(library)).evm_launch

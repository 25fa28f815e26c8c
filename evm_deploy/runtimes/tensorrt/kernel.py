"""CUDA kernel of the scan: source, limits, launch grid, and compilation for one GPU architecture."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from evm_deploy._util import processes
from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.toolchain.compile import read_recipe

CHANNELS, MAX_STATES, THREADS = 8, 16, 128  # as in native/tensorrt/selective_scan.h
MAX_GRID = 65535  # largest K and largest batch
KERNELS = {"float32": "evm_scan_f32", "float16": "evm_scan_f16"}  # dtype of u, delta, B, C and y -> kernel name
NVCC_HINT = "install the CUDA toolkit of the machine that will run the engine, or use --scan portable"


def source() -> Path:
    """Return the path of selective_scan.cu, with its header in the same folder. Raises ToolchainError if missing."""
    path = read_recipe().folder / "tensorrt" / "selective_scan.cu"
    if not path.is_file():
        raise ToolchainError(f"{path} is missing", "install evm-deploy again")
    return path


def check_scan(batch: int, K: int, D: int, N: int) -> None:
    """Raise UsageError if the kernel does not support a scan of this batch, K directions, D channels and N states."""
    if not 1 <= N <= MAX_STATES:
        raise UsageError(
            f"the CUDA kernel supports up to {MAX_STATES} states, but the scan has {N}", "use --scan portable"
        )
    if max(batch, K) > MAX_GRID:
        raise UsageError(f"the CUDA kernel supports batch and K up to {MAX_GRID}, got {batch} and {K}")


def grid(batch: int, K: int, D: int) -> tuple[int, int, int]:
    """Return the launch grid: number of blocks (of THREADS threads each) along x, y and z."""
    return -(-D // CHANNELS), K, batch


def compile_kernel(architecture: str, to: str = "ptx") -> bytes:
    """Compile both kernels with nvcc for a GPU architecture such as `sm_87`. Returns the PTX or CUBIN (`to`).

    A driver that is older than the CUDA release of nvcc refuses the PTX. Raises UsageError, ToolchainError.
    """
    if not re.fullmatch(r"sm_[0-9]{2,3}[af]?", architecture):
        raise UsageError(f"{architecture!r} is not a GPU architecture", "use a name such as sm_75, sm_87 or sm_90")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        raise ToolchainError("nvcc is not installed; the CUDA kernel is compiled with it", NVCC_HINT)
    target = architecture.replace("sm_", "compute_") if to == "ptx" else architecture
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan.{to}"
        command = [nvcc, "-std=c++17", f"-{to}", f"-arch={target}", "-o", str(path), str(source())]
        done = processes.run(command)
        if done.returncode:
            raise ToolchainError(f"nvcc failed for {architecture}: {done.stderr.strip()[-500:]}", NVCC_HINT)
        return path.read_bytes()

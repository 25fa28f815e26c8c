"""The CUDA kernel of the scan: its source, its limits, how it is launched, and compiling it for one architecture."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from evm_deploy.errors import ToolchainError, UsageError
from evm_deploy.toolchain.compile import read_recipe

CHANNELS, MAX_STATES, THREADS = 8, 16, 128  # as in native/tensorrt/selective_scan.h
MAX_GRID = 65535  # of K and of the batch
KERNELS = {"float32": "evm_scan_f32", "float16": "evm_scan_f16"}  # by dtype of u, delta, B, C and y
NVCC_HINT = "install the CUDA toolkit of the machine that will run the engine, or use --scan portable"


def source() -> Path:
    """selective_scan.cu, its header beside it. Raises ToolchainError where it was not installed."""
    path = read_recipe().folder / "tensorrt" / "selective_scan.cu"
    if not path.is_file():
        raise ToolchainError(f"{path} is missing", "install evm-deploy again")
    return path


def check_scan(batch: int, K: int, D: int, N: int) -> None:
    """Refuse a scan that the kernel does not do. Raises UsageError."""
    if not 1 <= N <= MAX_STATES:
        raise UsageError(f"the CUDA kernel takes up to {MAX_STATES} states, this scan has {N}", "use --scan portable")
    if max(batch, K) > MAX_GRID:
        raise UsageError(f"the CUDA kernel takes batch and K up to {MAX_GRID}, got {batch} and {K}")


def grid(batch: int, K: int, D: int) -> tuple[int, int, int]:
    """Blocks of THREADS threads along x, y and z."""
    return -(-D // CHANNELS), K, batch


def compile_kernel(architecture: str, to: str = "ptx") -> bytes:
    """PTX or CUBIN of both kernels for an architecture such as `sm_87`, by the nvcc of this machine.

    PTX is bound to the CUDA that wrote it: an older driver refuses it. Raises ToolchainError.
    """
    if not re.fullmatch(r"sm_[0-9]{2,3}[af]?", architecture):
        raise UsageError(f"{architecture!r} is no GPU architecture", "use sm_75, sm_87, sm_90 and the like")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        raise ToolchainError("the CUDA kernel is compiled with nvcc, which is not here", NVCC_HINT)
    target = architecture.replace("sm_", "compute_") if to == "ptx" else architecture
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan.{to}"
        command = [nvcc, "-std=c++17", f"-{to}", f"-arch={target}", "-o", str(path), str(source())]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise ToolchainError(f"nvcc failed for {architecture}: {done.stderr.strip()[-500:]}", NVCC_HINT)
        return path.read_bytes()

"""Count the instructions of a fused EVSS block for each token on AArch64, float32, half precision and int8, under qemu.

    python benchmarks/block_instructions.py

The blocks are those of T's two scan stages, on maps of 4x4 and 8x8 tokens: the figures are differences, so that fixed
costs cancel. Instructions are a hint: only a board says what they cost. Needs qemu-user, ziglang and Debian's
libc6-arm64-cross; takes some minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import where

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evm_deploy.toolchain import cross_compile
from evm_deploy.toolchain.compile import read_recipe
from evm_deploy.toolchain.platforms import PLATFORMS
from tests import driver as drivers
from tests.driver import HALVES, IN_HALF, Problem, block_problem, int8_block_problem
from tests.test_fused import image, random_block
from tests.test_fused_int8 import quantized
from tests.toolchains import AARCH64

PLATFORM = "linux-aarch64"
SIZES = (4, 8)  # H = W


def problem(kind: str, size: int, dim: int, rank: int) -> Problem:
    """Return a block of T's width, kind float, half (float16) or int8, as input of the driver."""
    block, x = random_block(0, dim, rank, 16), image(0, 1, size, size, dim)
    if kind == "int8":
        return int8_block_problem(x, quantized(block, x)).inference
    operands = [operand.numpy() for operand in block.fused_op().operands.values()]
    found = block_problem([x, *operands], 1, size, size, dim, 2 * dim, 16, rank, dim // 8).inference
    return replace(found, op=IN_HALF[torch.float16]) if kind == "half" else found


def counted(folder: Path, isa: str, of: Problem) -> int:
    """Return the instructions that the library runs: those without a symbol, which the driver's own have."""
    log = folder / "log"
    command = ["qemu-aarch64", "-L", AARCH64, "-singlestep", "-d", "exec,nochain", "-D", log, folder / "driver"]
    subprocess.run(command, input=of.to_bytes(), check=True, capture_output=True, env={**os.environ, "EVM_ISA": isa})
    with log.open("rb") as lines:
        return sum(line.endswith(b"] \n") for line in lines)


def main() -> int:
    """Run the benchmark; return the exit code."""
    print(f"{where()}, qemu-aarch64, instructions for each token")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiler = cross_compile.zig_compiler(PLATFORMS[PLATFORM].zig, PLATFORMS[PLATFORM].architecture, folder / "zig")
        library, include = cross_compile.library("onnxruntime", PLATFORM), f"-I{drivers.NATIVE / 'scan'}"
        compiler.run("-std=c++17", "-nostdlib++", include, drivers.SOURCE, library, "-o", folder / "driver")
        for dim, rank in ((48, 3), (96, 6)):
            tokens = SIZES[1] ** 2 - SIZES[0] ** 2
            per_token = {}
            for isa in (kernel.name for kernel in read_recipe().of("aarch64")):
                for kind in ("float", "int8", *(("half",) if isa in HALVES else ())):
                    few, many = (counted(folder, isa, problem(kind, size, dim, rank)) for size in SIZES)
                    per_token[isa, kind] = (many - few) / tokens
            for (isa, kind), count in per_token.items():
                print(f"C {dim} {isa} {kind}: {count:.0f}, {count / per_token[isa, 'float']:.2f} of float")
    return 0


if __name__ == "__main__":
    sys.exit(main())

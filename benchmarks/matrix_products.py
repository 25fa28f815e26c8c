"""Measure the matrix products of the native kernels by compiler: g++ and ziglang, float32 and int8 of 8 and 7 bits.

    python benchmarks/matrix_products.py

Multiply-adds per ns, the best of 3000 runs of 48 rows at the widths of T's stages, beside the rate of a pure
multiply-add loop on the same core (fma_peak.cpp).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import where

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scan import ISAS, fma_peak

from evm_deploy.toolchain.compile import read_recipe

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = {"g++": ["g++"], "ziglang": [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu"]}


def main() -> int:
    """Run the benchmark; return the exit code."""
    print(f"{where()}, multiply-adds per ns")
    recipe = read_recipe()
    flags = [*recipe.words["flags"], *(f"-I{recipe.folder / path}" for path in recipe.words["include"])]
    with tempfile.TemporaryDirectory() as folder:
        for kernel in recipe.of("x86_64"):
            if kernel.name not in ("base", "avx2", "avx512"):
                continue
            print(f"{kernel.name}: {fma_peak(*ISAS[kernel.name]):.1f} in a pure loop")
            for name, compiler in COMPILERS.items():
                program = Path(folder) / f"{kernel.name}-{name}"
                subprocess.run([*compiler, *flags, *kernel.arguments, str(SOURCE), "-o", str(program)], check=True)
                said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
                for line in said.splitlines():
                    depth, columns, in_float, in_int8, in_7_bits = line.split()
                    print(f"  {name}: {depth} x {columns}: float {in_float}, int8 {in_int8}, 7 bits {in_7_bits}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

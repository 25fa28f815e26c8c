"""Measure the compilation of the OpenVINO extension and of the library for ExecuTorch at their first use.

    python benchmarks/first_compile.py [--rounds 2]

CPU seconds of the compilers, the least of the rounds, with the archive of kernels that `pip install` has built and
without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from common import where

from evm_deploy.toolchain import executorch_library, openvino_extension
from evm_deploy.toolchain.compile import Recipe, parse_recipe, read_recipe


def compile_seconds(module, recipe: Recipe) -> float:
    """Measure the CPU seconds of the processes that compile the library of `module` by `recipe`."""
    module.read_recipe = lambda: recipe
    with tempfile.TemporaryDirectory() as work:
        before = os.times()
        module.compile_in(Path(work))
        after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    installed = read_recipe()
    archives = sorted((installed.folder.parent / "lib").glob("libevm_kernels-*.a"))
    print(f"{where()}, archives: {', '.join(f'{path.stat().st_size} bytes' for path in archives) or 'none'}")
    with tempfile.TemporaryDirectory() as folder:
        sources = parse_recipe(shutil.copytree(installed.folder, Path(folder) / "native"))
        for module in (openvino_extension, executorch_library):
            for name, recipe in {"as installed": installed, "without the archive": sources}.items():
                seconds = min(compile_seconds(module, recipe) for _ in range(rounds))
                print(f"{module.__name__.rpartition('.')[2]}, {name}: {seconds:.1f} CPU seconds", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""MIL runtime: compute Core ML programs (mlprogram) on any system, without Core ML.

    python -m evm_deploy.runtimes.mil model.mlpackage

The MIL runtime verifies the content of the file: graph, weights, declared shapes and types, float16 roundings and
quantisation parameters. It does not verify that Apple's compiler accepts the program, on which device the program runs
and how fast, or the arithmetic inside an operation on the Neural Engine or GPU. Every operation is computed in float32
here, and the result is rounded to the type that the file declares.
"""

from __future__ import annotations

from evm_deploy.runtimes.mil.program import Program
from evm_deploy.runtimes.mil.runtime import MilRuntime

__all__ = ["MilRuntime", "Program"]

"""Core ML programs (mlprogram) without Core ML: what they compute, on any system.

    python -m evm_deploy.runtimes.mil model.mlpackage

It proves the numbers of the program in the file: graph, weights, declared shapes and types, float16 roundings,
quantisation parameters. It does not prove that Apple's compiler takes the program, nor where or how fast it runs, nor
the arithmetic inside an operation on the Neural Engine or GPU (here float32, rounded to the type that the file says).
"""

from __future__ import annotations

from evm_deploy.runtimes.mil.program import Program
from evm_deploy.runtimes.mil.runtime import MilRuntime

__all__ = ["MilRuntime", "Program"]

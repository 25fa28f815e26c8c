"""Runtimes that are no targets, and compile the loop-free ONNX file of a bundle: MNN and IREE."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def converted(*command: str) -> None:
    """Run a converter in a process of its own: they print, and some end the process."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout)[-500:])


def names(model: Path) -> tuple[str, list[str]]:
    """The name of the input, and those of the outputs."""
    graph = onnx.load(model).graph
    return graph.input[0].name, [value.name for value in graph.output]


def mnn(model: Path, folder: Path) -> Run:
    """`model` in MNN, on one thread, in float32.

    The converter is called without MNN.tools.mnnconvert, which installs a package when it is imported.
    """
    import MNN

    file, (reads, writes) = folder / f"{model.parent.name}.mnn", names(model)
    code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
    converted("-c", code, "-f", "ONNX", "--modelFile", str(model), "--MNNModel", str(file), "--bizCode", "evm")
    manager = MNN.nn.create_runtime_manager(({"backend": 0, "precision": "high", "numThread": 1},))
    module = MNN.nn.load_module_from_file(str(file), [reads], writes, runtime_manager=manager)
    kinds = {"uint8": MNN.expr.dtype.uint8, "float32": MNN.expr.dtype.float}

    def run(value: np.ndarray) -> dict[str, np.ndarray]:
        # NCHW is the order of an ONNX file's tensors, whatever their axes mean
        given = MNN.expr.const(value, list(value.shape), MNN.expr.NCHW, kinds[str(value.dtype)])
        found = [MNN.expr.convert(each, MNN.expr.NCHW) for each in module.forward([given])]
        if len(found) < len(writes):
            raise RuntimeError("MNN cannot compute the shapes; it has printed where")
        return {name: np.array(each.read()).reshape(each.shape) for name, each in zip(writes, found, strict=True)}

    return run


def iree(model: Path, folder: Path) -> Run:
    """`model` compiled by IREE for this CPU, on one thread."""
    import iree.compiler
    import iree.runtime

    mlir, file, (_, writes) = folder / "model.mlir", folder / f"{model.parent.name}.vmfb", names(model)
    converted("-m", "iree.compiler.tools.import_onnx", str(model), "-o", str(mlir))
    stack = "--iree-llvmcpu-stack-allocation-limit=131072"  # its default, 32 KB, is less than a LayerNorm of T takes
    flags = ["--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3", stack]
    blob = iree.compiler.compile_file(str(mlir), target_backends=["llvm-cpu"], input_type="onnx", extra_args=flags)
    file.write_bytes(blob)
    module = iree.runtime.load_vm_flatbuffer_file(str(file), driver="local-sync")
    (name,) = [each for each in module.vm_module.function_names if not each.startswith("__") and "$" not in each]

    def run(value: np.ndarray) -> dict[str, np.ndarray]:
        found: Any = module[name](value)
        found = found if isinstance(found, (tuple, list)) else [found]
        return {name: np.asarray(each.to_host()) for name, each in zip(writes, found, strict=True)}

    return run


RUNTIMES: Mapping[str, Callable[[Path, Path], Run]] = {"MNN": mnn, "IREE": iree}
MODULES = {"MNN": ("MNN", "MNN"), "IREE": ("iree", "iree-base-runtime")}  # to import, and in pip

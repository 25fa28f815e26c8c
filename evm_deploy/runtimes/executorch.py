"""Programs of ExecuTorch (.pte), run by our library for ExecuTorch: without torch, and without ExecuTorch's Python."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import native_path
from evm_deploy.errors import BundleError, UsageError
from evm_deploy.runtimes.base import DEFAULTS, Feeds, RunOptions, TensorSpec
from evm_deploy.runtimes.info import NativeKernels, Requirement, RuntimeInfo
from evm_deploy.toolchain.executorch_library import isa, library, open_library

#: ExecuTorch's numbers of element types -> numpy's names.
DTYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
}
#: Method of a program that returns the names of `forward`'s inputs and outputs: lines, an empty line between the two.
NAMES = "evm_names"
MESSAGE_BYTES = 512


class ExecuTorchRuntime:
    """Program of ExecuTorch, with the delegate XNNPACK and our kernels.

    options: `threads` is a number of this model if it is 1. Other numbers are those of the one pool of a process, which
    cannot change while other models use it; None takes the pool as it is, at first one thread for each core.
    Raises BundleError if the file cannot be opened, UsageError for another number of threads than an open model has,
    ToolchainError if executorch is not installed or our library is missing.
    """

    def __init__(self, path: Path, options: RunOptions = DEFAULTS) -> None:
        self._native = open_library(options.plugin)
        self._message = ctypes.create_string_buffer(MESSAGE_BYTES)
        place = str(native_path(path)).encode()
        self._program = self._native.evm_program_open(place, options.threads or 0, self._message, MESSAGE_BYTES)
        if not self._program:
            said = self._message.value.decode(errors="replace")
            if "pool of threads" in said:
                raise UsageError(said, f"close the other model, or use the same number of threads: {options.threads}")
            raise BundleError(f"ExecuTorch cannot open {path}: {said}")
        try:
            names = _names(self._native.evm_program_names(self._program).decode(errors="replace"))
            self.inputs, self.outputs = (self._specs(output, names[output]) for output in (0, 1))
        except BundleError:
            self._close()
            raise

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Raises BundleError if ExecuTorch fails."""
        given = [np.ascontiguousarray(feeds[name]) for name in self.inputs]
        results = {name: np.empty(_sizes(spec), spec.dtype) for name, spec in self.outputs.items()}
        if self._native.evm_program_run(
            self._program, _addresses(given), _addresses(list(results.values())), self._message, MESSAGE_BYTES
        ):
            raise BundleError(f"ExecuTorch: {self._message.value.decode(errors='replace')}")
        return results

    def _specs(self, output: int, names: list[str]) -> Mapping[str, TensorSpec]:
        """Describe the inputs or outputs. Raises BundleError unless every one has a name and a type of numpy."""
        count = self._native.evm_program_count(self._program, output)
        if len(names) != count:
            what = "outputs" if output else "inputs"
            raise BundleError(f"the program has {count} {what} and {len(names)} names of {what}", "export it again")
        found = {}
        for index, name in enumerate(names):
            facts = self._native.evm_program_describe(self._program, output, index)
            if facts.type not in DTYPES:
                raise BundleError(f"{name!r} of the program has type {facts.type} of ExecuTorch, which numpy lacks")
            found[name] = TensorSpec(name, DTYPES[facts.type], tuple(facts.dims[: facts.rank]))
        return found

    def _close(self) -> None:
        if self._program:
            self._native.evm_program_close(self._program)
            self._program = None

    def __enter__(self) -> ExecuTorchRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        if getattr(self, "_program", None):
            self._close()


def _names(text: str) -> tuple[list[str], list[str]]:
    """Split the text of the method NAMES into the names of inputs and of outputs."""
    inputs, _, outputs = text.partition("\n\n")
    return inputs.split("\n"), outputs.split("\n")


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size for size in spec.shape if size is not None)


def _addresses(arrays: list[NDArray[Any]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


INFO = RuntimeInfo(
    name="executorch",
    aliases=("pte",),
    label="ExecuTorch",
    precisions=("fp32", "int8"),
    needs=(Requirement("executorch", "executorch", "1.5.1"),),
    extra="run-executorch",
    open=ExecuTorchRuntime,
    scan_case="scan-{K}x{L}x{D}x{N}.pte",
    kernels=NativeKernels("executorch", library, isa),
)

"""`MilRuntime`: an mlprogram package as a Runtime, with the inputs and outputs that an app sees in Core ML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.torch_settings import default_torch_settings
from evm_deploy.errors import BundleError
from evm_deploy.runtimes.base import Feeds, TensorSpec
from evm_deploy.runtimes.mil.program import Program


class MilRuntime:
    """Runtime that computes a Program, with the input and output types that the package declares.

    An image input takes uint8 pixels (1, H, W, 3), or (1, H, W, 1) if they are grey, like the input `image` of every
    target. The dictionary of a classifier becomes an array (1, classes) of probabilities in the order of the classes.
    The label output of a classifier is left out.
    """

    def __init__(self, path: Path, function: str | None = None, *, exact: bool = False) -> None:
        self.program = Program(path, function, exact=exact)
        description = self.program.spec.description
        found = next((f for f in description.functions if f.name == self.program.function), description)
        kinds = {value.name: value.type.WhichOneof("Type") for value in (*found.input, *found.output)}
        self.images = {name for name in self.program.inputs if kinds[name] == "imageType"}
        self.dictionaries = {name for name in self.program.outputs if kinds[name] == "dictionaryType"}
        self.inputs: Mapping[str, TensorSpec] = {name: self._input(name) for name in self.program.inputs}
        self.outputs: Mapping[str, TensorSpec] = {
            name: self._output(name) for name in self.program.outputs if kinds[name] != "stringType"
        }

    @property
    def largest(self) -> float:
        """Largest magnitude of all float16 results so far."""
        return self.program.largest

    @default_torch_settings()
    def run(self, feeds: Feeds, wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one inference. Returns the tensors `wanted`, by default the outputs.

        `feeds` and `wanted` may also name tensors between operations. Raises UsageError, BundleError.
        """
        fed = {name: self._fed(name, value) for name, value in feeds.items()}
        values = self.program.run(fed, list(self.outputs) if wanted is None else wanted)
        return {name: value[None] if name in self.dictionaries else value for name, value in values.items()}

    def _fed(self, name: str, value: NDArray[Any]) -> NDArray[Any]:
        return value.transpose(0, 3, 1, 2).astype(np.float32) if name in self.images else value

    def _input(self, name: str) -> TensorSpec:
        declared = self.program.inputs[name]
        if declared.shape is None or declared.dtype not in ("fp32", "fp16"):
            raise BundleError(f"{self.program.path}: input {name} is neither an image nor a tensor of floats")
        if name in self.images:
            batch, channels, height, width = declared.shape
            return TensorSpec(name, "uint8", (batch, height, width, channels))
        return TensorSpec(name, "float32", declared.shape)

    def _output(self, name: str) -> TensorSpec:
        if name in self.dictionaries:
            maker = next(op for op in self.program.operations if any(result.name == name for result in op.results))
            return TensorSpec(name, "float32", (1, len(maker.constants["classes"])))
        declared = self.program.declared(name)
        return TensorSpec(name, "int32" if declared.dtype == "int32" else "float32", declared.shape or ())

    def __enter__(self) -> MilRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.program

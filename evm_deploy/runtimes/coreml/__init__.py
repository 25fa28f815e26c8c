"""Core ML itself, on a Mac, where this project never ran it; elsewhere programs are computed by `runtimes.mil`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime, TensorSpec
from evm_deploy.runtimes.coreml.tools import coremltools
from evm_deploy.runtimes.info import Requirement, RuntimeInfo

EMULATED = "Core ML runs on Apple systems only: the MIL runtime computes what the program says, not how fast Core ML is"
CHOSEN_ITSELF = "Core ML chooses threads, device and cache by itself", "leave them out"


class CoreMlRuntime:
    """One function of a package, by default its default one, compiled and run by Core ML on all compute units, with the
    inputs and outputs of MilRuntime.

    Raises ToolchainError anywhere but on macOS, BundleError when Core ML refuses the package.
    """

    def __init__(self, path: Path, function: str | None = None) -> None:
        if sys.platform != "darwin":
            raise ToolchainError(
                f"Core ML runs on Apple systems only, this is {sys.platform}",
                f"copy the bundle to a Mac, or see what it computes:  python -m evm_deploy.runtimes.mil {path}",
            )
        ct = coremltools()
        try:
            self.model: Any = ct.models.MLModel(str(path), function_name=function)
        except Exception as error:  # coremltools wraps Core ML's errors in RuntimeError, or lets them through
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BundleError(f"Core ML cannot open {path}: {reason}") from error
        description = self.model.get_spec().description
        self.labels: list[str] = json.loads(description.metadata.userDefined.get("labels", "[]"))
        name = function or description.defaultFunctionName
        self.function: str = name or "main"
        description = next((each for each in description.functions if each.name == name), description)
        found = [tensor_spec(value, len(self.labels)) for value in (*description.input, *description.output)]
        specs = {spec.name: spec for spec in found if spec}
        self.inputs: Mapping[str, TensorSpec] = {v.name: specs[v.name] for v in description.input}
        self.outputs: Mapping[str, TensorSpec] = {v.name: specs[v.name] for v in description.output if v.name in specs}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        import PIL.Image

        given = {
            name: PIL.Image.fromarray(value[0]) if value.dtype == np.uint8 else value for name, value in feeds.items()
        }
        found = self.model.predict(given)
        return {name: self._array(found[name]) for name in self.outputs}

    def compute_plan(self) -> dict[str, Any]:
        """Operations, and share of the estimated cost, by the device that Core ML prefers for them."""
        from evm_deploy.runtimes.coreml.compute_plan import compute_plan

        return compute_plan(self.model, self.model.compute_unit, self.function)

    def _array(self, value: Any) -> NDArray[Any]:
        """A dictionary of a classifier as the row of its probabilities, in the order of the labels."""
        row = [[value[label] for label in self.labels]] if isinstance(value, dict) else value
        return np.asarray(row, np.float32)

    def __enter__(self) -> CoreMlRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.model


def tensor_spec(value: Any, classes: int) -> TensorSpec | None:
    """What an app gives or gets; None for a classifier's label."""
    kind = value.type.WhichOneof("Type")
    if kind == "imageType":
        return TensorSpec(value.name, "uint8", (1, value.type.imageType.height, value.type.imageType.width, 3))
    if kind == "dictionaryType":
        return TensorSpec(value.name, "float32", (1, classes))
    if kind == "stringType":
        return None
    return TensorSpec(value.name, "float32", tuple(value.type.multiArrayType.shape))


def open_(path: Path, options: RunOptions) -> Runtime:
    """Core ML on a Mac, the MIL runtime anywhere else; `INFO.availability().hint` says so. Raises UsageError."""
    if options.threads:
        raise UsageError(*CHOSEN_ITSELF)
    return CoreMlRuntime(path, options.function) if sys.platform == "darwin" else emulator(path, options)


def emulator(path: Path, options: RunOptions) -> Runtime:
    """The MIL runtime, which of the options has use for the function alone."""
    from evm_deploy.runtimes.mil import MilRuntime

    return MilRuntime(path, options.function)


def obstacle() -> str:
    return "" if sys.platform == "darwin" else EMULATED


INFO = RuntimeInfo(
    name="coreml",
    aliases=("apple", "ios", "mlpackage"),
    label="Core ML",
    precisions=("fp16", "fp32", "int8", "w8"),
    needs=(Requirement("coremltools", "coremltools", "9.0"),),
    extra="coreml",
    open=open_,
    scan_case="scan-{K}x{L}x{D}x{N}.mlpackage",
    obstacle=obstacle,
    refusals=dict.fromkeys(("device", "cache"), CHOSEN_ITSELF),
)

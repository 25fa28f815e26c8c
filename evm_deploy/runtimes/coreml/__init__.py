"""Core ML runtime for macOS. Other systems compute mlprogram packages with `runtimes.mil`. Not run on a Mac yet."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy._util.files import native_path
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes.base import Feeds, RunOptions, Runtime, TensorSpec
from evm_deploy.runtimes.coreml.tools import coremltools
from evm_deploy.runtimes.info import Requirement, RuntimeInfo

EMULATED = "Core ML runs on Apple systems only: the MIL runtime computes the same outputs, but shows no Core ML latency"
CHOSEN_ITSELF = "Core ML chooses threads, device and cache by itself", "leave these settings out"


class CoreMlRuntime:
    """Function of an mlprogram package, compiled and run by Core ML on all compute units.

    function: None for the default function of the package. Inputs and outputs are the same as those of MilRuntime.
    Raises ToolchainError on other systems than macOS, BundleError if Core ML refuses the package.
    """

    def __init__(self, path: Path, function: str | None = None) -> None:
        if sys.platform != "darwin":
            raise ToolchainError(
                f"Core ML runs on Apple systems only, not on {sys.platform}",
                f"copy the bundle to a Mac, or compute its outputs here:  python -m evm_deploy.runtimes.mil {path}",
            )
        ct = coremltools()
        try:
            self.model: Any = ct.models.MLModel(native_path(path), function_name=function)
        except Exception as error:  # coremltools wraps some of Core ML's errors in RuntimeError
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
        """Run one inference. Pixels (1, H, W, 3) or (1, H, W, 1) uint8 are passed to Core ML as an image."""
        given = {name: _image(value[0]) if value.dtype == np.uint8 else value for name, value in feeds.items()}
        found = self.model.predict(given)
        return {name: self._array(found[name], spec.dtype) for name, spec in self.outputs.items()}

    def compute_plan(self) -> dict[str, Any]:
        """Return the number of operations and the share of the estimated cost, per device that Core ML prefers."""
        from evm_deploy.runtimes.coreml.compute_plan import compute_plan

        return compute_plan(self.model, self.model.compute_unit, self.function)

    def _array(self, value: Any, dtype: str) -> NDArray[Any]:
        """Convert an output to its dtype. A classifier's dictionary becomes a row of probabilities in label order."""
        row = [[value[label] for label in self.labels]] if isinstance(value, dict) else value
        return np.asarray(row, dtype)

    def __enter__(self) -> CoreMlRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.model


def _image(pixels: NDArray[np.uint8]) -> Any:
    """Return pixels (H, W, 3) or (H, W, 1) as a Pillow image."""
    import PIL.Image

    return PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def tensor_spec(value: Any, classes: int) -> TensorSpec | None:
    """Return the spec of an input or output in Core ML's model description; None for a classifier's label.

    classes: number of labels, which is the size of a classifier's dictionary.
    """
    kind = value.type.WhichOneof("Type")
    if kind == "imageType":
        image = value.type.imageType
        channels = 1 if image.colorSpace == image.ColorSpace.Value("GRAYSCALE") else 3
        return TensorSpec(value.name, "uint8", (1, image.height, image.width, channels))
    if kind == "dictionaryType":
        return TensorSpec(value.name, "float32", (1, classes))
    if kind == "stringType":
        return None
    array = value.type.multiArrayType
    whole = array.dataType == array.ArrayDataType.Value("INT32")
    return TensorSpec(value.name, "int32" if whole else "float32", tuple(array.shape))


def open_(path: Path, options: RunOptions) -> Runtime:
    """Open a package with Core ML on a Mac, and with the MIL runtime on other systems.

    `INFO.availability().hint` explains the difference. Raises UsageError if `options` set threads.
    """
    if options.threads:
        raise UsageError(*CHOSEN_ITSELF)
    return CoreMlRuntime(path, options.function) if sys.platform == "darwin" else emulator(path, options)


def emulator(path: Path, options: RunOptions) -> Runtime:
    """Open a package with the MIL runtime. Of `options`, only `function` applies."""
    from evm_deploy.runtimes.mil import MilRuntime

    return MilRuntime(path, options.function)


def obstacle() -> str:
    """Return the reason why Core ML cannot run on this machine; empty on a Mac."""
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

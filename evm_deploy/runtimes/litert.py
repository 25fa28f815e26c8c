"""LiteRT (TensorFlow Lite) on the CPU, where XNNPACK computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import BundleError, ToolchainError
from evm_deploy.runtimes.base import DEFAULTS, Feeds, RunOptions, TensorSpec
from evm_deploy.runtimes.info import Requirement, RuntimeInfo

MODULE = "ai_edge_litert"


class LiteRt:
    """Interpreter for a .tflite file or its content, with the tensors of its first signature.

    options.threads: None for LiteRT's default, which is one thread. One thread at a time may call `run`.
    Raises ToolchainError if LiteRT is not installed, BundleError for a file that it cannot open.
    """

    def __init__(self, model: Path | bytes, options: RunOptions = DEFAULTS) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ToolchainError("ai-edge-litert is not installed", INFO.install_hint) from error
        source = {"model_path": str(model)} if isinstance(model, Path) else {"model_content": model}
        name = model.name if isinstance(model, Path) else "the model"
        try:
            self.interpreter = Interpreter(**source, num_threads=options.threads)
            self.interpreter.allocate_tensors()
            runner = self.interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"LiteRT cannot open {name}: {_reason(error)}") from error
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self.inputs: Mapping[str, TensorSpec] = _specs(runner.get_input_details(), self._inputs)
        self.outputs: Mapping[str, TensorSpec] = _specs(runner.get_output_details(), self._outputs)

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Run one inference. Raises BundleError if LiteRT fails."""
        try:
            for name, place in self._inputs.items():
                self.interpreter.set_tensor(place, np.ascontiguousarray(feeds[name]))
            self.interpreter.invoke()
            return {name: self.interpreter.get_tensor(place) for name, place in self._outputs.items()}
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"LiteRT cannot run the model: {_reason(error)}") from error

    def __enter__(self) -> LiteRt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.interpreter


def _specs(details: Mapping[str, Mapping[str, Any]], places: dict[str, int]) -> dict[str, TensorSpec]:
    """Convert the tensors of a signature to specs, and keep their places in the interpreter in `places`."""
    places.update({name: int(each["index"]) for name, each in details.items()})
    return {
        name: TensorSpec(name, np.dtype(each["dtype"]).name, tuple(map(int, each["shape"])))
        for name, each in details.items()
    }


def _reason(error: Exception) -> str:
    """Return the first line of an error message of LiteRT."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


INFO = RuntimeInfo(
    name="litert",
    aliases=("tflite",),
    label="LiteRT",
    precisions=("fp32", "fp16", "int8"),
    needs=(Requirement(MODULE, "ai-edge-litert", "2.3"),),
    extra="run-litert",
    open=LiteRt,
    scan_case="scan-{K}x{L}x{D}x{N}.tflite",
)

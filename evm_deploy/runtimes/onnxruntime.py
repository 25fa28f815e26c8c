"""ONNX Runtime on the CPU execution provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evm_deploy.errors import BundleError, ToolchainError
from evm_deploy.runtimes.base import Feeds, TensorSpec

INSTALL_HINT = "pip install 'evm-deploy[onnx]'"


class OnnxRuntime:
    """An InferenceSession over a file or serialised model.

    `threads`: intra-op threads, None for ORT's default. `plugin`: our custom-op library; without it the scans' portable
    bodies run. Raises BundleError when the model cannot be opened, ToolchainError when the library cannot.
    """

    def __init__(self, model: Path | bytes, threads: int | None = None, plugin: Path | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise ToolchainError("onnxruntime is not installed", INSTALL_HINT) from error
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        if plugin:
            try:
                options.register_custom_ops_library(str(plugin))
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise ToolchainError(f"ONNX Runtime {ort.__version__} refuses {plugin}: {reason}") from error
        source = str(model) if isinstance(model, Path) else model
        try:
            self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT raises its own types, all derived from Exception alone
            reason = str(error).strip().splitlines()[0]
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot open the model: {reason}") from error
        self.inputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in map(_spec, self.session.get_inputs())}
        self.outputs: Mapping[str, TensorSpec] = {spec.name: spec for spec in map(_spec, self.session.get_outputs())}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        return dict(zip(self.outputs, self.session.run(None, dict(feeds)), strict=True))

    def __enter__(self) -> OnnxRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.session


def _spec(value: Any) -> TensorSpec:
    names = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
    shape = tuple(dim if isinstance(dim, int) else None for dim in value.shape)
    return TensorSpec(value.name, names.get(value.type) or np.dtype(value.type[7:-1]).name, shape)

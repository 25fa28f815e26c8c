"""Context binaries for Qualcomm's NPU, in ONNX Runtime with the QNN plugin. On x86-64 the plugin emulates the NPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from evm_deploy.errors import ToolchainError
from evm_deploy.runtimes.base import RunOptions, Runtime
from evm_deploy.runtimes.info import Requirement, RuntimeInfo
from evm_deploy.runtimes.onnxruntime import OnnxRuntime
from evm_deploy.runtimes.providers import OnnxRuntimeSettings, npu_emulator

MODULE = "onnxruntime_qnn"


def on_npu(options: Mapping[str, str] | None = None) -> OnnxRuntimeSettings:
    """Return the settings of ONNX Runtime for the NPU alone: no node may run on the CPU. options: of the plugin."""
    return OnnxRuntimeSettings("qnn", json.dumps(dict(options)) if options else None)


def require_plugin() -> None:
    """Raise ToolchainError if the QNN plugin is not installed."""
    if not find_spec(MODULE):
        raise ToolchainError("onnxruntime-qnn is not installed", INFO.install_hint)


def open_(path: Path, options: RunOptions) -> Runtime:
    """Open a context binary. Raises the errors of `OnnxRuntime`, and ToolchainError without the plugin."""
    require_plugin()
    return OnnxRuntime(path, options.threads, settings=on_npu())


INFO = RuntimeInfo(
    name="qnn",
    aliases=("htp", "snapdragon"),
    label="Qualcomm NPU",
    precisions=("fp16",),
    needs=(Requirement("onnxruntime", "onnxruntime", "1.24.2"), Requirement(MODULE, "onnxruntime-qnn", "2.7")),
    extra="run-qnn",
    open=open_,
    scan_case="scan-{K}x{L}x{D}x{N}.onnx",
    obstacle=npu_emulator,
)

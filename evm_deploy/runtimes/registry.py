"""The explicit list of runtimes, one for each target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evm_deploy._util.settings import all_fields, changed, flag_of
from evm_deploy._util.text import one_of
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes import coreml, onnxruntime, openvino, tensorrt
from evm_deploy.runtimes.info import RuntimeInfo

RUNTIMES = (onnxruntime.INFO, openvino.INFO, coreml.INFO, tensorrt.TRT, tensorrt.TRT_RTX)


def load_runtimes() -> dict[str, RuntimeInfo]:
    """Every runtime by the name of its target."""
    return {info.name: info for info in RUNTIMES}


def runtime_of(target: str, bundle: Path) -> RuntimeInfo:
    """The runtime of a bundle's target. Raises BundleError for a target that a later version knows."""
    known = load_runtimes()
    if target not in known:
        raise BundleError(
            f"bundle {bundle} is for target {target!r}, which this evm-deploy does not know; it knows: "
            f"{', '.join(known)}",
            "upgrade: pip install -U evm-deploy",
        )
    return known[target]


def setting_kinds() -> list[type | None]:
    """The run settings of every runtime: their fields are the flags of evm-run and evm-bench."""
    return [info.settings for info in RUNTIMES]


def configured(info: RuntimeInfo, values: Mapping[str, Any]) -> Any | None:
    """The runtime's own settings from values by name; defaults of others' do no harm. None where it has none.

    Raises UsageError for a setting that it does not have, saying so as the runtime would, and for one of nobody's.
    """
    known = all_fields(setting_kinds())
    own = all_fields([info.settings])
    for name in changed(values, setting_kinds()):
        one_of("run setting", name, known)
        if name in own:
            continue
        flag = flag_of(known[name])
        text = f"target '{info.name}' has no {flag.what or flag.name}", f"leave {flag.name} out"
        raise UsageError(*info.refusals.get(name, text))
    return info.settings(**{name: values[name] for name in own if name in values}) if info.settings else None


def plugin_path(runtime: str) -> Path:
    """The library to register with a plain `runtime`, `onnxruntime` or `openvino` (which may take a minute to compile).

    Raises ToolchainError where it was not, or cannot be, built.
    """
    kernels = {info.kernels.name: info.kernels for info in RUNTIMES if info.kernels}
    if runtime not in kernels:
        raise ToolchainError(f"no native library for {runtime!r}; there is one for: {', '.join(kernels)}")
    return kernels[runtime].installed()

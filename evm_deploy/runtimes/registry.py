"""Registry: the explicit list of runtimes, one per target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evm_deploy._util.packages import upgrade_hint
from evm_deploy._util.settings import all_fields, changed, flag_of
from evm_deploy._util.text import one_of
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes import coreml, executorch, litert, onnxruntime, openvino, qnn, tensorrt
from evm_deploy.runtimes.info import RuntimeInfo

RUNTIMES = (
    onnxruntime.INFO,
    openvino.INFO,
    coreml.INFO,
    tensorrt.TRT,
    tensorrt.TRT_RTX,
    qnn.INFO,
    litert.INFO,
    executorch.INFO,
)


def load_runtimes() -> dict[str, RuntimeInfo]:
    """Return all runtimes: name of the target -> runtime."""
    return {info.name: info for info in RUNTIMES}


def runtime_of(target: str, bundle: Path) -> RuntimeInfo:
    """Return the runtime for the target of a bundle. Raises BundleError for an unknown target."""
    known = load_runtimes()
    if target not in known:
        raise BundleError(
            f"bundle {bundle} is for target {target!r}, which this evm-deploy does not know; known targets: "
            f"{', '.join(known)}",
            upgrade_hint(),
        )
    return known[target]


def setting_kinds() -> list[type | None]:
    """Return the settings classes of all runtimes. Their fields are the flags of evm-run and evm-bench."""
    return [info.settings for info in RUNTIMES]


def configured(info: RuntimeInfo, values: Mapping[str, Any]) -> Any | None:
    """Create the settings of a runtime from values by name. None if the runtime has no settings.

    Raises UsageError for an unknown setting, and for a setting of another runtime unless its value is the default.
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
    """Return the native library to register with a runtime that an app uses without evm-deploy.

    runtime: `onnxruntime` or `openvino`. The OpenVINO library may have to be compiled first, which can take a minute.
    Raises ToolchainError if the library was not built or cannot be built.
    """
    kernels = {info.kernels.name: info.kernels for info in RUNTIMES if info.kernels}
    if runtime not in kernels:
        raise ToolchainError(f"no native library for {runtime!r}; available: {', '.join(kernels)}")
    return kernels[runtime].installed()

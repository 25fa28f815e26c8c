"""List of all targets, explicit."""

from __future__ import annotations

from evm_deploy._util.text import one_of
from evm_deploy.errors import ToolchainError
from evm_deploy.export import executorch, litert, onnx, openvino, qnn
from evm_deploy.export.coreml import target as coreml
from evm_deploy.export.target import Target
from evm_deploy.export.tensorrt import target as tensorrt

TARGETS = (
    onnx.TARGET,
    openvino.TARGET,
    coreml.TARGET,
    tensorrt.TRT,
    tensorrt.TRT_RTX,
    qnn.TARGET,
    litert.TARGET,
    executorch.TARGET,
)


def load_targets() -> dict[str, Target]:
    """Return every target by name."""
    return {target.name: target for target in TARGETS}


def get_target(name: str, flag: str = "--target") -> Target:
    """Return the target with this name or alias, the value of `flag`. Raises UsageError with the list of all names."""
    targets = load_targets()
    names = {alias: target for target in targets.values() for alias in (target.name, *target.runtime.aliases)}
    return names[one_of(flag, name.lower(), names)]


def resolve_names(text: str) -> list[str]:
    """Resolve `onnx`, `onnx,trt` or `all` to target names, in order and without repeats. Raises UsageError.

    all: every target whose packages are installed; `left_out` has the others. Raises ToolchainError if there is none.
    """
    if text == "all":
        missing = left_out()
        if found := [name for name in load_targets() if name not in missing]:
            return found
        raise ToolchainError(
            "--target all: no target can be built here, packages are missing", next(iter(missing.values()))
        )
    return list(dict.fromkeys(get_target(name.strip()).name for name in text.split(",")))


def left_out() -> dict[str, str]:
    """Return how to install the missing packages, by the name of each target that cannot be built here."""
    found = {name: target.environment() for name, target in load_targets().items()}
    return {name: environment.hint for name, environment in found.items() if not environment.can_build}

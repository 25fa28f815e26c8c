"""The explicit list of targets."""

from __future__ import annotations

from evm_deploy._util.text import one_of
from evm_deploy.export import coreml, onnx, openvino
from evm_deploy.export.target import Target
from evm_deploy.export.tensorrt import target as tensorrt

TARGETS = (onnx.TARGET, openvino.TARGET, coreml.TARGET, tensorrt.TRT, tensorrt.TRT_RTX)


def load_targets() -> dict[str, Target]:
    """Every target by name."""
    return {target.name: target for target in TARGETS}


def get_target(name: str) -> Target:
    """A target by name or alias. Raises UsageError listing all of them."""
    targets = load_targets()
    names = {alias: target for target in targets.values() for alias in (target.name, *target.runtime.aliases)}
    return names[one_of("--target", name.lower(), names)]


def resolve_names(text: str) -> list[str]:
    """`onnx`, `onnx,trt` or `all` -> canonical names without repeats, in order."""
    if text == "all":
        return list(load_targets())
    return list(dict.fromkeys(get_target(name.strip()).name for name in text.split(",")))

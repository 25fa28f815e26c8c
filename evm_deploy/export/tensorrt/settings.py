"""Settings of TensorRT's engine builder."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy._util.settings import Settings, setting, whole, wholes
from evm_deploy.errors import UsageError


@dataclass(frozen=True)
class EngineSettings(Settings):
    """Settings of TensorRT's engine builder. None means TensorRT's own default.

    workspace_mib: largest scratch memory in MiB. sms: GPU architectures that the engine is for, such as 86
    (TensorRT-RTX). efficient_nms: suppress boxes with the plugin
    EfficientNMS_TRT, not with INMSLayer. defer: if this machine cannot build the engine, leave the build to the device.
    """

    workspace_mib: int | None = setting(
        None, "--workspace", metavar="MIB", read=whole, help="TensorRT: largest scratch memory of the builder, in MiB"
    )
    version_compatible: bool = setting(
        False, "--version-compatible", help="TensorRT: engine that later releases can run too, but slower"
    )
    hardware_compatible: bool = setting(
        False, "--hardware-compatible", help="TensorRT: engine for every GPU since Ampere, but slower"
    )
    efficient_nms: bool = setting(
        False,
        "--efficient-nms",
        help="TensorRT: suppress a detector's boxes with the plugin EfficientNMS_TRT, which takes the best 4096 "
        "candidates of an image",
    )
    sms: tuple[int, ...] = setting(
        (),
        "--sm",
        metavar="N[,N..]",
        read=wholes,
        help="TensorRT-RTX: GPU architectures that the engine is for, such as 86,89",
    )
    defer: bool = setting(True, "--no-defer", help="TensorRT: fail if the engine cannot be built here (exit 3)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"--workspace {self.workspace_mib}: use 1 MiB or more")

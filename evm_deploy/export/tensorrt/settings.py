"""How TensorRT builds its engine."""

from __future__ import annotations

from dataclasses import dataclass

from evm_deploy._util.settings import setting, whole, wholes
from evm_deploy.errors import UsageError


@dataclass(frozen=True)
class EngineSettings:
    """None: as TensorRT does by itself.

    workspace_mib: most scratch memory, in MiB. sms: architectures of the GPUs it is for, such as 86, with TensorRT-RTX.
    timing_cache: file that keeps kernel timings between builds. defer: leave the engine to the device where it cannot
    be built here.
    """

    workspace_mib: int | None = setting(
        None, "--workspace", metavar="MIB", read=whole, help="TensorRT: most scratch memory of its builder, in MiB"
    )
    version_compatible: bool = setting(
        False, "--version-compatible", help="TensorRT: an engine for later releases too, slower"
    )
    hardware_compatible: bool = setting(
        False, "--hardware-compatible", help="TensorRT: an engine for every GPU since Ampere, slower"
    )
    timing_cache: str | None = setting(
        None, "--timing-cache", metavar="FILE", help="TensorRT: timings of kernels, kept between builds"
    )
    sms: tuple[int, ...] = setting(
        (),
        "--sm",
        metavar="N[,N..]",
        read=wholes,
        help="TensorRT-RTX: architectures that the engine is for, such as 86,89",
    )
    defer: bool = setting(True, "--no-defer", help="TensorRT: fail where the engine cannot be built here (exit 3)")

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"--workspace {self.workspace_mib}: use MiB from 1")

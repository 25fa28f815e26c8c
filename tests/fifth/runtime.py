"""The run half of target `fifth`: ONNX files with another suffix, computed by ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evm_deploy._util.settings import setting
from evm_deploy.errors import UsageError
from evm_deploy.runtimes.base import RunOptions, Runtime
from evm_deploy.runtimes.info import Profiler, Requirement, RuntimeInfo
from evm_deploy.runtimes.onnxruntime import OnnxRuntime


@dataclass(frozen=True)
class FifthSettings:
    """gear: how fast to run it, 1 to 5."""

    gear: str = setting("1", "--gear", metavar="N", help="Fifth: gear, 1 (default) to 5", what="gears")

    def __post_init__(self) -> None:
        if self.gear not in "12345":
            raise UsageError(f"--gear {self.gear}: use 1 to 5")


def open_(path: Path, options: RunOptions) -> Runtime:
    return OnnxRuntime(path.read_bytes(), options.threads, options.plugin, options.profile)


INFO = RuntimeInfo(
    name="fifth",
    aliases=("5th",),
    label="Fifth",
    precisions=("fp32",),
    needs=(Requirement("onnxruntime", "onnxruntime", "1.17"),),
    extra="run-onnx",
    open=open_,
    scan_case="scan.fifth",
    profiler=Profiler("the fifth's profiler", records=True),
    streams=True,
    settings=FifthSettings,
)

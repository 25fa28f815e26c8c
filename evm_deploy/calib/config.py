"""Settings of a quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evm_deploy.tasks.task import Task


@dataclass(frozen=True)
class QuantizationConfig:
    """Settings of one quantisation. ExportPlan explains the fields; ModelSpec explains the last five."""

    precision: str
    calib: Path | None
    images: int
    method: str
    smooth: str
    force: bool
    val: Path | None
    max_drop: float | None
    num_classes: int
    labels: tuple[str, ...] | None
    checkpoint_sha256: str
    input: str
    task: Task
    blocks: tuple[str, ...]
    keep_float: tuple[str, ...]
    weight_only: tuple[str, ...]
    float_around_scans: bool

"""Settings of a quantisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from evm_deploy._util.kept import KeptResults
from evm_deploy.data.boxes import DEFAULT_SELECTION, SelectionSettings
from evm_deploy.tasks.task import Reading, Task


@dataclass(frozen=True)
class QuantizationConfig:
    """Settings of one quantisation. ExportPlan explains the fields; ModelSpec explains the last six but four.

    weight_bits: 8, or 7. selection: that of a detector. fuses: whether modules that may become one op become it.
    kept: results of an interrupted run, and those of this one.
    """

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
    weight_bits: int = 8
    selection: SelectionSettings = DEFAULT_SELECTION
    fuses: bool = False
    kept: KeptResults = field(default_factory=KeptResults, compare=False)

    @property
    def reading(self) -> Reading:
        """How outputs are read."""
        return Reading(self.labels, selection=self.selection, classes=self.num_classes)

"""Budget of a device: upper limits of latency, size and memory, written as `p50<20ms, size<10MB, memory<200MB`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evm_deploy._util.text import one_of
from evm_deploy.errors import UsageError

MS, MB = "ms", "MB"
#: Unit of each figure that a budget can limit. MB of memory are 2**20 bytes, as in records.
METRICS: Mapping[str, str] = {"p50": MS, "p90": MS, "p95": MS, "p99": MS, "size": MB, "memory": MB}
UNITS: Mapping[str, Mapping[str, float]] = {
    MS: {"us": 1e-3, "ms": 1.0, "s": 1e3},
    MB: {"kB": 1e-3, "MB": 1.0, "GB": 1e3},
}
EXAMPLE = '--budget "p50<20ms, size<10MB, memory<200MB"'


@dataclass(frozen=True)
class Budget:
    """Upper limits by metric, in the units of METRICS."""

    limits: tuple[tuple[str, float], ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the limited figures, in the order of the budget."""
        return tuple(name for name, _ in self.limits)

    def shares(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Return the known ones of the limited figures relative to their limits: 1 is at the limit."""
        return {name: figures[name] / most for name, most in self.limits if name in figures}

    def excess(self, figures: Mapping[str, float]) -> float:
        """Return how far the worst of the known figures is above its limit, relative to it; negative below it."""
        return max(self.shares(figures).values(), default=1.0) - 1

    def fits(self, figures: Mapping[str, float]) -> bool:
        """Test whether all known figures are within their limits."""
        return self.excess(figures) <= 0

    def __str__(self) -> str:
        return ", ".join(f"{name} < {most:g} {METRICS[name]}" for name, most in self.limits)


def parse_budget(text: str) -> Budget:
    """Parse limits with commas between them, such as `p50<20ms, size<10MB`. Raises UsageError."""
    limits: dict[str, float] = {}
    for part in (each.strip() for each in text.split(",")):
        match = re.fullmatch(r"(\w+) *<=? *([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", part, re.ASCII)
        if not match:
            raise UsageError(f"--budget {part!r} is no limit", f"write  {EXAMPLE}")
        name = one_of("--budget: figure", match[1], METRICS)
        units = UNITS[METRICS[name]]
        if not match[3]:
            raise UsageError(f"--budget {part!r} has no unit", f"{name} is in {', '.join(units)}")
        most = float(match[2]) * units[one_of(f"--budget: unit of {name}", match[3], units)]
        if name in limits:
            raise UsageError(f"--budget limits {name} twice", "give one limit for each figure")
        if not 0 < most < 1e12:
            raise UsageError(f"--budget {part!r} is not possible", "use a number above 0")
        limits[name] = most
    return Budget(tuple(limits.items()))


def figures_text(figures: Mapping[str, float], names: Sequence[str]) -> str:
    """Format those of the figures that are known: `p50 12.3 ms, size 1.38 MB`."""
    return ", ".join(f"{name} {figures[name]:.3g} {METRICS[name]}" for name in names if name in figures)

"""Comparison of two sets of measurements of the same bundles: regressions, improvements, and latency limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evm_deploy.bench.latency import apart
from evm_deploy.bench.record import Record
from evm_deploy.errors import UsageError
from evm_deploy.report.candidate import Candidate, Conditions, device_name, plain
from evm_deploy.report.collect import identity, newest


@dataclass(frozen=True)
class Pair:
    """Two measurements of the same bundle, setting and device."""

    old: Candidate
    new: Candidate

    @property
    def label(self) -> str:
        """Name of the bundle with target, precision and settings."""
        return f"{self.new.name} ({self.new.label})"

    @property
    def conditions(self) -> Conditions:
        """Conditions of the new measurement."""
        return self.new.conditions

    @property
    def ratio(self) -> float:
        """New median over old median; above 1 is slower."""
        assert self.old.p50 and self.new.p50
        return self.new.p50 / self.old.p50

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the ratio from the ends of both 95 % intervals, so its confidence is above 95 %."""
        assert self.old.interval and self.new.interval
        (old_low, old_high), (low, high) = self.old.interval, self.new.interval
        return low / old_high, high / old_low

    @property
    def changes(self) -> list[str]:
        """Versions of the system and of packages that differ between the two measurements: `Linux 6.1 -> Linux 6.8`."""
        assert self.old.record and self.new.record
        old, new = self.old.record, self.new.record
        found = [(old.device.get(key), new.device.get(key), "") for key in ("system", "governor")]
        versions = (old.runtime["versions"], new.runtime["versions"])
        found += [(versions[0].get(name), versions[1].get(name), f"{name} ") for name in {**versions[0], **versions[1]}]
        return [plain(f"{name}{before} -> {after}") for before, after, name in found if before != after]

    @property
    def stable(self) -> bool:
        """Whether both measurements were stable."""
        return self.old.stable and self.new.stable

    @property
    def verdict(self) -> str:
        """`regression` or `improvement`; `same` if the intervals of the medians overlap."""
        assert self.old.interval and self.new.interval
        if not apart(self.old.interval, self.new.interval):
            return "same"
        return "regression" if self.ratio > 1 else "improvement"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, as --json prints it."""
        return {
            "name": self.new.name,
            "settings": str(self.conditions),
            "old_ms": self.old.p50,
            "new_ms": self.new.p50,
            "ratio": round(self.ratio, 4),
            "interval": [round(end, 4) for end in self.interval],
            "verdict": self.verdict,
            "stable": self.stable,
            "changes": self.changes,
        }


@dataclass(frozen=True)
class Comparison:
    """Result of comparing OLD with NEW.

    new: all candidates of NEW. gone: candidates of OLD without a counterpart in NEW. unmatched: one sentence for each
    record without a counterpart.
    """

    pairs: tuple[Pair, ...]
    new: tuple[Candidate, ...]
    gone: tuple[Candidate, ...]
    unmatched: tuple[str, ...]


def compare(old: Sequence[Record], new: Sequence[Record]) -> Comparison:
    """Match records by bundle, setting and device, and pair them.

    Raises UsageError if no record matches, so that a gate does not pass without a comparison.
    """
    olds, news = ({identity(record): Candidate.of_record(record) for record in newest(side)} for side in (old, new))
    pairs = tuple(Pair(olds[key], news[key]) for key in olds if key in news)
    left = [("OLD", olds[key], news) for key in olds if key not in news]
    left += [("NEW", news[key], olds) for key in news if key not in olds]
    unmatched = tuple(
        f"only in {side}: {each.name}, {each.conditions}{_elsewhere(each, other)}" for side, each, other in left
    )
    if not pairs:
        raise UsageError(
            "nothing to compare: no record of OLD has a counterpart in NEW\n  " + "\n  ".join(unmatched[:10])
        )
    return Comparison(pairs, tuple(news.values()), tuple(olds[key] for key in olds if key not in news), unmatched)


def _elsewhere(each: Candidate, others: dict[tuple[object, ...], Candidate]) -> str:
    """Return a note if the other side measured the same bundle on another device, else an empty string."""
    here = each.conditions.device
    for other in others.values():
        there = other.conditions.device
        if other.name == each.name and there != here and here and there:
            return f" (measured on different devices: {device_name(here)}; {device_name(there)})"
    return ""

"""Two sets of measurements of the same bundles: what got slower, what faster, what cannot be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evm_deploy.bench.latency import apart
from evm_deploy.bench.record import Record
from evm_deploy.errors import LatencyError, UsageError
from evm_deploy.report.candidate import Candidate, Conditions, device_name, milliseconds
from evm_deploy.report.collect import identity, newest


@dataclass(frozen=True)
class Pair:
    """The same bundle, setting and device, measured twice. ratio: new time over old; above 1 is slower."""

    old: Candidate
    new: Candidate

    @property
    def label(self) -> str:
        return f"{self.new.name} ({self.new.label})"

    @property
    def conditions(self) -> Conditions:
        return self.new.conditions

    @property
    def ratio(self) -> float:
        assert self.old.p50 and self.new.p50
        return self.new.p50 / self.old.p50

    @property
    def interval(self) -> tuple[float, float]:
        """Of the ratio, from both ends of both 95 % intervals: wider than 95 %."""
        assert self.old.interval and self.new.interval
        (old_low, old_high), (low, high) = self.old.interval, self.new.interval
        return low / old_high, high / old_low

    @property
    def stable(self) -> bool:
        return self.old.stable and self.new.stable

    @property
    def verdict(self) -> str:
        """`regression`, `improvement`, or `same` where the intervals of the medians overlap."""
        assert self.old.interval and self.new.interval
        if not apart(self.old.interval, self.new.interval):
            return "same"
        return "regression" if self.ratio > 1 else "improvement"

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.new.name,
            "settings": str(self.conditions),
            "old_ms": self.old.p50,
            "new_ms": self.new.p50,
            "ratio": round(self.ratio, 4),
            "interval": [round(end, 4) for end in self.interval],
            "verdict": self.verdict,
            "stable": self.stable,
        }


@dataclass(frozen=True)
class Comparison:
    """new: all candidates of NEW. unmatched: one sentence for each record that has no counterpart."""

    pairs: tuple[Pair, ...]
    new: tuple[Candidate, ...]
    unmatched: tuple[str, ...]


def compare(old: Sequence[Record], new: Sequence[Record]) -> Comparison:
    """Match records by bundle, setting and device. Raises UsageError when nothing matches: that is no passed check."""
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
    return Comparison(pairs, tuple(news.values()), unmatched)


def require(
    pairs: Sequence[Pair],
    measured: Sequence[Candidate],
    max_regression: float | None = None,
    max_latency_ms: float | None = None,
) -> None:
    """Raise LatencyError for a regression of more than `max_regression` percent, or a median above `max_latency_ms`."""
    slow = []
    if max_regression is not None:
        slow += [
            f"{pair.label}: {pair.ratio:.2f}x the time of before ({max_regression:g} % more allowed)"
            for pair in pairs
            if pair.verdict == "regression" and pair.ratio > 1 + max_regression / 100
        ]
    if max_latency_ms is not None:
        slow += [
            f"{each.name} ({each.conditions}): p50 {milliseconds(each.p50)} ms ({max_latency_ms:g} ms allowed)"
            for each in measured
            if each.p50 is not None and each.p50 > max_latency_ms
        ]
    if slow:
        raise LatencyError("too slow\n  " + "\n  ".join(slow))


def _elsewhere(each: Candidate, others: dict[tuple[object, ...], Candidate]) -> str:
    """Whether the other side has the same bundle on another device."""
    here = each.conditions.device
    for other in others.values():
        there = other.conditions.device
        if other.name == each.name and there != here and here and there:
            return f" (measured on different devices: {device_name(here)}; {device_name(there)})"
    return ""

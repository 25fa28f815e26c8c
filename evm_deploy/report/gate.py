"""Latency gate: limits for the bundles that can ship. A limit that checked no bundle has not been met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evm_deploy.errors import LatencyError, UsageError
from evm_deploy.report.candidate import Candidate, milliseconds
from evm_deploy.report.compare import Pair
from evm_deploy.report.verdict import MAX_DROP, UNSTABLE, why_unfit


@dataclass(frozen=True)
class Gate:
    """Limits of a report.

    max_latency_ms: largest accepted median. max_regression: largest accepted rise of a median in percent. select:
    `target` or `target,precision` of the bundles to check; empty for all. max_drop: accepted drop of the
    main figure in points; bundles beyond it cannot ship, so they are not checked.
    """

    max_latency_ms: float | None = None
    max_regression: float | None = None
    select: tuple[str, ...] = ()
    max_drop: float = MAX_DROP

    def check(
        self, candidates: Sequence[Candidate], pairs: Sequence[Pair] = (), gone: Sequence[Candidate] = ()
    ) -> tuple[list[str], LatencyError | None]:
        """Apply the limits. Returns sentences that name the rows that were checked and those that were not, and the
        error of a limit that is exceeded, or None.

        A measurement that was not stable exceeds every limit. gone: candidates that were measured before, and are
        missing now; with `max_regression` they exceed it. Raises UsageError if a limit has nothing to check.
        """
        if self.max_latency_ms is None and self.max_regression is None:
            return [], None
        said: list[str] = []
        failed: list[str] = []
        if self.max_latency_ms is not None:
            limit = f"limit: {self.max_latency_ms:g} ms"
            rows, said = self._judged(candidates, limit)
            failed += [
                f"{name(each)}: p50 {milliseconds(each.p50 or 0)} ms ({limit})"
                for each in rows
                if each.p50 is not None and each.p50 > self.max_latency_ms
            ]
            failed += [f"{name(each)}: {UNSTABLE} ({limit})" for each in rows if not each.stable]
        if self.max_regression is not None:
            limit = f"limit: {self.max_regression:g} % more"
            rows, more = self._judged([pair.new for pair in pairs], limit)
            said += more
            for pair in pairs:
                if pair.new not in rows:
                    continue
                if pair.verdict == "regression" and pair.ratio > 1 + self.max_regression / 100:
                    failed.append(f"{name(pair.new)}: {pair.ratio:.2f}x the old time ({limit})")
                elif not pair.stable:
                    failed.append(f"{name(pair.new)}: {UNSTABLE} ({limit})")
            missing = [each for each in gone if self._selected(each) and not why_unfit(each, self.max_drop)]
            failed += [f"{name(each)}: measured in OLD, missing in NEW ({limit})" for each in missing]
        return said, LatencyError("latency limit exceeded\n  " + "\n  ".join(failed)) if failed else None

    def _judged(self, candidates: Sequence[Candidate], limit: str) -> tuple[list[Candidate], list[str]]:
        """Return the measured candidates that can ship, and sentences about what was checked. Raises UsageError."""
        rows, said, others = [], [], []
        for each in candidates:
            why = "not selected" if not self._selected(each) else why_unfit(each, self.max_drop)
            why = why or ("" if each.record else "not measured")
            if why:
                others.append(f"{name(each)}: {why}")
            else:
                rows.append(each)
        if not rows:
            raise UsageError(
                f"{limit}: no measured bundle to check\n  " + "\n  ".join(others[:10]),
                "measure bundles with evm-bench" + (", or choose another --select" if self.select else ""),
            )
        said = [f"{limit}, checked: {'; '.join(map(name, rows))}"]
        return rows, said + ([f"{limit}, not checked: {'; '.join(others)}"] if others else [])

    def _selected(self, each: Candidate) -> bool:
        """Test whether --select names the candidate."""
        return not self.select or any(text in (each.target, f"{each.target},{each.precision}") for text in self.select)


def name(each: Candidate) -> str:
    """Return name and conditions of a candidate, with the settings in which rows of one group differ."""
    settings = f", {', '.join(each.variant)}" if each.variant else ""
    return f"{each.name} ({each.conditions}{settings})"

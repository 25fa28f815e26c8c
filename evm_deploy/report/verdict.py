"""What to ship, in one sentence, and why.

The rule, for the candidates of one group (same model, device, image size, batch, threads, streams, and part timed):

1. Out are: the torch baseline, which has no bundle; what was rejected at export, failed its accuracy gate, or lost more
   than `max_drop` points of top-1; what was not stable.
2. A difference in latency is one when the 95 % intervals of the medians do not overlap. Of the candidates that do not
   differ from the fastest, the one with the least loss of accuracy is shipped (unknown counts as most), then the
   smallest: no accuracy is given up for a speed that was not shown.
3. The speed is given against the baseline: ONNX fp32, else the fp32 bundle that is fastest, else torch, else the
   slowest. An int8 that is not faster than the fp32 of its own target is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evm_deploy.bench.latency import apart
from evm_deploy.bench.measurable import TORCH
from evm_deploy.report.candidate import Candidate

MAX_DROP = 1.0


@dataclass(frozen=True)
class Verdict:
    """ship: None where nothing can be recommended. notes: what else the reader must know, a sentence each."""

    sentence: str
    ship: Candidate | None
    baseline: Candidate | None
    notes: tuple[str, ...]


def verdict(group: Sequence[Candidate], max_drop: float = MAX_DROP) -> Verdict:
    """Judge the candidates of one group by the rule above."""
    measured = [each for each in group if each.record]
    baseline = baseline_of(measured)
    out = {id(each): why for each in group if (why := why_out(each, max_drop))}
    notes = tuple(
        [f"{each.label} is out: {out[id(each)]}" for each in group if id(each) in out and each.target != TORCH]
        + [text for each in measured if (text := slow_int8(each, measured))]
    )
    running = [each for each in measured if id(each) not in out]
    if not measured:
        return Verdict("nothing was measured: run evm-bench on these bundles", None, None, notes)
    if not running:
        return Verdict("nothing to ship: every candidate is out", None, baseline, notes)
    ship = choose(running)
    assert baseline is not None
    return Verdict(f"ship {ship.label}: {reason(ship, baseline, running, measured)}", ship, baseline, notes)


def why_out(each: Candidate, max_drop: float) -> str:
    """Why it cannot be recommended; empty if it can."""
    if each.target == TORCH:
        return "a baseline, not a bundle"
    if each.rejected:
        return f"rejected at export: {each.rejected}"
    if each.drop is not None and each.drop > max_drop:
        return f"{-each.drop:+.2f} points of top-1, {max_drop:g} may be lost"
    if each.accuracy and each.accuracy.get("ok") is False:
        return "it failed its accuracy gate"
    if not each.stable:
        return "its latency was not stable: measure again on an idle machine"
    return ""


def choose(running: Sequence[Candidate]) -> Candidate:
    """Of those that do not differ from the fastest, the most accurate, then the smallest."""
    fastest = min(running, key=_p50)
    level = [each for each in running if each is fastest or not differ(each, fastest)]
    return min(level, key=lambda each: (_known(each.drop), each.size_bytes, _p50(each), each.label))


def baseline_of(measured: Sequence[Candidate]) -> Candidate | None:
    """What speeds are given against; None of nothing."""

    def rank(each: Candidate) -> tuple[bool, bool, bool, bool, float]:
        bundle_fp32 = each.is_float and each.target != TORCH
        order = _p50(each) if bundle_fp32 else -_p50(each)
        return (
            not (bundle_fp32 and each.target == "onnx"),
            not bundle_fp32,
            each.target != TORCH,
            bool(each.variant),
            order,
        )

    return min(measured, key=rank, default=None)


def differ(one: Candidate, other: Candidate) -> bool:
    """Whether the intervals of two measured candidates do not overlap."""
    assert one.interval and other.interval
    return apart(one.interval, other.interval)


def speed(each: Candidate, baseline: Candidate) -> float:
    """How many times as fast as the baseline."""
    return _p50(baseline) / _p50(each)


def reason(ship: Candidate, baseline: Candidate, running: Sequence[Candidate], measured: Sequence[Candidate]) -> str:
    """`1.7x faster than onnx fp32 at -0.2 points`."""
    slower_int8 = [each for each in running if each is not ship and each.precision == "int8" and _p50(each) > 0]
    if ship is not baseline and differ(ship, baseline):
        ratio = speed(ship, baseline)
        return f"{ratio:.2f}x {'faster than' if ratio > 1 else 'the speed of'} {baseline.label}{at_accuracy(ship)}"
    if ship is not baseline:
        return f"no slower than {baseline.label}{at_accuracy(ship)}"
    if ship.is_float and slower_int8:
        best = min(slower_int8, key=_p50)
        return f"{best.label} is {speed(best, ship):.2f}x of it here{at_accuracy(ship)}"
    alone = "it is the only candidate" if len(running) == 1 else "nothing is faster"
    return f"{alone}{at_accuracy(ship)}"


def at_accuracy(ship: Candidate) -> str:
    """`at -0.2 points`; nothing of the float model, which it is compared with."""
    if ship.drop is None:
        return ", accuracy unknown"
    if round(ship.drop, 1) == 0:
        return "" if ship.is_float else " at the accuracy of float"
    return f" at {-ship.drop:+.1f} points"


def slow_int8(each: Candidate, measured: Sequence[Candidate]) -> str:
    """A sentence on an int8 that is not faster than the fp32 of its target in the same setting; else empty."""
    if each.precision != "int8":
        return ""
    fp32 = next((o for o in measured if o.is_float and (o.target, o.variant) == (each.target, each.variant)), None)
    if fp32 is None or (differ(each, fp32) and _p50(each) < _p50(fp32)):
        return ""
    how = "" if differ(each, fp32) else ", no difference that was shown"
    return f"{each.label} is {speed(each, fp32):.2f}x of {fp32.label} here{how}: int8 gains no speed"


def _p50(each: Candidate) -> float:
    assert each.p50 is not None
    return each.p50


def _known(drop: float | None) -> float:
    return float("inf") if drop is None else drop

"""Verdict on a group of candidates: which one to ship, in one sentence with the reason.

The rule for the candidates of one group (same model, device, image size, batch, threads, streams, and part timed):

1. These candidates are excluded: the torch baseline, which has no bundle; a bundle that was rejected at export, failed
   its accuracy gate, or lost more than `max_drop` points of the task's main figure, such as top-1 or AP; a measurement
   that was not stable.
2. Two latencies differ if the 95 % intervals of their medians do not overlap. Among the candidates that do not differ
   from the fastest one, the rule ships the one with the smallest loss of accuracy, then the smallest one. So no
   accuracy is given up for a speed that was not shown. A candidate of unknown accuracy is never shipped: a note names
   it if it is faster, and it is only called the fastest if there is no other.
3. Speeds are relative to the baseline: ONNX fp32, else the fastest fp32 bundle, else torch, else the slowest candidate.
   A note names each int8 bundle that is not faster than the fp32 bundle of its own target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evm_deploy.bench.latency import apart
from evm_deploy.bench.measurable import TORCH
from evm_deploy.report.candidate import Candidate

MAX_DROP = 1.0  # points of the main figure
UNSTABLE = "latency not stable: measure again on an idle machine"
EVALUATE = "evaluate it before you ship it: evm-bench --matrix --val, or for int8 and w8 evm-export --val"


@dataclass(frozen=True)
class Verdict:
    """Recommendation for a group.

    ship: the recommended candidate, or None. baseline: candidate that speeds are relative to, or None. notes: further
    remarks, one sentence each.
    """

    sentence: str
    ship: Candidate | None
    baseline: Candidate | None
    notes: tuple[str, ...]


def verdict(group: Sequence[Candidate], max_drop: float = MAX_DROP) -> Verdict:
    """Choose the candidate to ship from one group, by the rule in the module's docstring."""
    measured = [each for each in group if each.record]
    baseline = baseline_of(measured)
    out = {id(each): why for each in group if (why := why_out(each, max_drop))}
    notes = tuple(
        [f"{each.label} is excluded: {out[id(each)]}" for each in group if id(each) in out and each.target != TORCH]
        + [text for each in measured if (text := slow_int8(each, measured))]
    )
    running = [each for each in measured if id(each) not in out]
    if not measured:
        return Verdict("nothing was measured: run evm-bench on these bundles", None, None, notes)
    if not running:
        return Verdict("nothing to ship: every candidate is excluded", None, baseline, notes)
    assert baseline is not None
    known = [each for each in running if each.drop is not None]
    if not known:
        best = choose(running)
        sentence = f"fastest is {best.label}: {reason(best, baseline, running)}: {EVALUATE}"
        return Verdict(sentence, None, baseline, notes)
    ship = choose(known)
    notes += tuple(
        f"{each.label} is {speed(each, ship):.2f}x as fast as {ship.label}, accuracy unknown: {EVALUATE}"
        for each in running
        if each.drop is None and _p50(each) < _p50(ship) and differ(each, ship)
    )
    return Verdict(f"ship {ship.label}: {reason(ship, baseline, running)}", ship, baseline, notes)


def why_out(each: Candidate, max_drop: float) -> str:
    """Return the reason to exclude a candidate, or an empty string."""
    return why_unfit(each, max_drop) or ("" if each.stable else UNSTABLE)


def why_unfit(each: Candidate, max_drop: float) -> str:
    """Return the reason that a candidate cannot be shipped whatever its latency is, or an empty string."""
    if each.target == TORCH:
        return "a baseline, not a bundle"
    if each.rejected:
        return f"rejected at export: {each.rejected}"
    if each.drop is not None and each.drop > max_drop:
        return f"{-each.drop:+.2f} points of {each.metric}, limit {-max_drop:g}"
    if each.accuracy and each.accuracy.get("ok") is False:
        return "accuracy gate failed"
    return ""


def choose(running: Sequence[Candidate]) -> Candidate:
    """Return the most accurate candidate that does not differ from the fastest; a tie goes to the smallest."""
    fastest = min(running, key=_p50)
    level = [each for each in running if each is fastest or not differ(each, fastest)]
    return min(level, key=lambda each: (_known(each.drop), each.size_bytes, _p50(each), each.label))


def baseline_of(measured: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that speeds are relative to (rule 3), or None if nothing was measured."""

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
    """Test whether the latencies of two measured candidates differ: their intervals do not overlap."""
    assert one.interval and other.interval
    return apart(one.interval, other.interval)


def speed(each: Candidate, baseline: Candidate) -> float:
    """Return the speed of a candidate relative to the baseline; above 1 is faster."""
    return _p50(baseline) / _p50(each)


def reason(ship: Candidate, baseline: Candidate, running: Sequence[Candidate]) -> str:
    """Return the reason in the verdict's sentence: `1.70x faster than onnx fp32 at -0.2 points`."""
    known = [each for each in running if each.drop is not None]
    slower_int8 = [each for each in known if each is not ship and each.precision == "int8" and _p50(each) > 0]
    if ship is not baseline and differ(ship, baseline):
        ratio = speed(ship, baseline)
        return f"{ratio:.2f}x {'faster than' if ratio > 1 else 'the speed of'} {baseline.label}{at_accuracy(ship)}"
    if ship is not baseline:
        return f"no slower than {baseline.label}{at_accuracy(ship)}"
    if ship.is_float and slower_int8:
        best = min(slower_int8, key=_p50)
        return f"{best.label} has {speed(best, ship):.2f}x the speed here{at_accuracy(ship)}"
    if len(running) == 1:
        return f"the only candidate{at_accuracy(ship)}"
    if len(known) < len(running) and known:
        return f"{'the only candidate' if len(known) == 1 else 'the fastest'} of known accuracy{at_accuracy(ship)}"
    return f"nothing is faster{at_accuracy(ship)}"


def at_accuracy(ship: Candidate) -> str:
    """Return the accuracy part of the verdict's sentence: ` at -0.2 points`; empty for the float model."""
    if ship.drop is None:
        return ", accuracy unknown"
    if round(ship.drop, 1) == 0:
        return "" if ship.is_float else " at the accuracy of float"
    return f" at {-ship.drop:+.1f} points"


def slow_int8(each: Candidate, measured: Sequence[Candidate]) -> str:
    """Return a sentence if an int8 bundle is not faster than the fp32 bundle of its target in the same setting."""
    if each.precision != "int8":
        return ""
    fp32 = next((o for o in measured if o.is_float and (o.target, o.variant) == (each.target, each.variant)), None)
    if fp32 is None or (differ(each, fp32) and _p50(each) < _p50(fp32)):
        return ""
    how = "" if differ(each, fp32) else " (no significant difference)"
    return f"{each.label} has {speed(each, fp32):.2f}x the speed of {fp32.label} here{how}: int8 gains no speed"


def _p50(each: Candidate) -> float:
    """Return the median of a measured candidate in ms."""
    assert each.p50 is not None
    return each.p50


def _known(drop: float | None) -> float:
    """Return the drop, infinity for an unknown one."""
    return float("inf") if drop is None else drop

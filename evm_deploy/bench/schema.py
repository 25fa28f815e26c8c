"""What a record must look like, to be trusted by a report: the right keys, types, and finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HUGE = 1e15  # more than any time in milliseconds, size in bytes or rate that can be meant

Check = Callable[[Any, str], None]  # raises ValueError that names the place


def text(value: Any, where: str) -> None:
    _require(isinstance(value, str), where, "text", value)


def yes_or_no(value: Any, where: str) -> None:
    _require(isinstance(value, bool), where, "true or false", value)


def number(value: Any, where: str) -> None:
    """Finite; NaN fails both comparisons."""
    _require(_numeric(value) and -HUGE <= value <= HUGE, where, "a finite number", value)


def size(value: Any, where: str) -> None:
    """A number from 0."""
    _require(_numeric(value) and 0 <= value <= HUGE, where, "a finite number from 0", value)


def positive(value: Any, where: str) -> None:
    _require(_numeric(value) and 0 < value <= HUGE, where, "a finite number above 0", value)


def count(value: Any, where: str) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= HUGE, where, "1 or more", value)


def anything(value: Any, where: str) -> None:
    """Not used in a comparison."""


def nullable(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def listing(check: Check, length: int | None = None, at_least: int = 0) -> Check:
    """A list of what `check` takes, of this length, or at least that long."""

    def run(value: Any, where: str) -> None:
        fits = isinstance(value, list | tuple) and len(value) >= at_least and length in (None, len(value))
        _require(fits, where, f"a list of {length or f'at least {at_least}'}", value)
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return run


def mapping(check: Check) -> Check:
    """Any keys, with values that `check` takes."""

    def run(value: Any, where: str) -> None:
        _require(isinstance(value, dict), where, "an object", value)
        for key, item in value.items():
            check(item, f"{where}.{key[:40]}")

    return run


def keys(**checks: Check) -> Check:
    """These keys at least; what is not listed is not looked at. Any of them, if `nullable`, may be absent."""

    def run(value: Any, where: str) -> None:
        _require(isinstance(value, dict), where, "an object", value)
        for key, check in checks.items():
            check(value.get(key), f"{where}.{key}" if where else key)

    return run


def either(empty: Any, check: Check) -> Check:
    return lambda value, where: None if value == empty else check(value, where)


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(good: bool, where: str, wanted: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{where} must be {wanted}, is {value!r:.60}")


ACCURACY = keys(
    images=size,
    **dict.fromkeys(
        ("sqnr_db", "agreement", "top1", "top1_float", "top5", "top5_float", "limit", "drop"), nullable(number)
    ),
    ok=nullable(yes_or_no),
)
LAYERS = keys(
    how=text,
    sum_ms=size,
    of_inference=size,
    scan_share=nullable(size),
    kinds=mapping(size),
    modules=listing(keys(module=text, kind=text, ms=size, calls=size)),
)
STATE = keys(
    clocks_mhz=nullable(listing(size)),
    temperatures_c=nullable(mapping(number)),
    throttled=nullable(size),
    load=nullable(size),
)
RECORD = keys(
    bundle=keys(
        **dict.fromkeys(("name", "model", "target", "precision"), text),
        imgsz=listing(count, length=2),
        manifest_sha256=nullable(text),
        artifact_bytes=size,
        accuracy=nullable(ACCURACY),
    ),
    device=keys(
        **dict.fromkeys(("at", "profile", "model", "cpu", "machine", "governor", "system", "python"), nullable(text)),
        **dict.fromkeys(("cores", "usable_cores", "memory_mb"), nullable(size)),
    ),
    runtime=keys(
        versions=mapping(text), scan=keys(value=text, reason=nullable(text)), plan=nullable(mapping(anything))
    ),
    settings=keys(
        threads=nullable(count),
        batch=count,
        streams=nullable(count),
        timed=text,
        **dict.fromkeys(("scan", "device", "cache"), nullable(text)),
        cuda_graph=nullable(yes_or_no),
        limit_s=nullable(size),
    ),
    date=text,
    load_ms=mapping(size),
    first_ms=size,
    warm_up=size,
    stable=yes_or_no,
    samples_ms=listing(size, at_least=1),
    summary_ms=keys(**dict.fromkeys(("p50", "p90", "p95", "p99", "mean", "max"), positive), std=size, min=size),
    interval_ms=listing(positive, length=2),
    device_ms=mapping(size),
    layers=either({}, LAYERS),
    energy_mj=mapping(size),
    throughput=size,
    memory_mb=mapping(size),
    before=STATE,
    after=STATE,
    warnings=listing(text),
)

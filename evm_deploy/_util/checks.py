"""What untrusted JSON must look like: checks to compose, each of which raises InvalidError, which names the place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

HUGE = 1e15  # more than any time in milliseconds, size in bytes or rate that can be meant

Check = Callable[[Any, str], None]  # raises InvalidError


class InvalidError(ValueError):
    """What is wrong, and `where`: the key path, such as inputs[0].shape."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where:.200} {text}")
        self.where = where


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


def at_most(check: Check, most: float) -> Check:
    def run(value: Any, where: str) -> None:
        check(value, where)
        _require(value <= most, where, f"at most {most}", value)

    return run


def matching(pattern: str) -> Check:
    return lambda value, where: _require(
        isinstance(value, str) and bool(re.fullmatch(pattern, value)), where, f"text like {pattern}", value
    )


def anything(value: Any, where: str) -> None:
    """Not used in a comparison."""


def nullable(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def one_of(*values: str) -> Check:
    return lambda value, where: _require(value in values, where, f"one of {', '.join(values)}", value)


def listing(check: Check, length: int | None = None, at_least: int = 0) -> Check:
    """A list of what `check` takes, of this length, or at least that long."""

    def run(value: Any, where: str) -> None:
        fits = isinstance(value, list | tuple) and len(value) >= at_least and length in (None, len(value))
        _require(fits, where, f"a list of {length or f'at least {at_least}'}", value)
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return run


def mapping(check: Check, name: Check = anything) -> Check:
    """Keys that `name` takes, with values that `check` takes."""

    def run(value: Any, where: str) -> None:
        _require(isinstance(value, dict), where, "an object", value)
        for key, item in value.items():
            name(key, f"{where}.{key}")
            check(item, f"{where}.{key}")

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
        raise InvalidError(where, f"must be {wanted}, is {value!r:.60}")

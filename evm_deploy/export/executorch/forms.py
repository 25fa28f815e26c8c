"""Refusal of forms of ONNX operators that have no function here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Numbers = Sequence[int]
Floats = Sequence[float]


def refuse(what: str, value: Any, has: Any) -> None:
    """Raise ValueError for a form of an operator that there is no function for."""
    raise ValueError(f"{what} is {value}, possible is {has}")

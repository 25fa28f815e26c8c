"""Parts that all rules share: how they are collected, what they raise, and how they take constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]


class UnsupportedError(Exception):
    """An operation, or a variant of one, for which there is no rule."""


def into(table: dict[str, Rule]) -> Callable[[Rule], Rule]:
    """A decorator that puts a rule into `table`, under its function's name."""

    def rule(function: Rule) -> Rule:
        table[function.__name__] = function
        return function

    return rule


def tensor(value: Any) -> Any:
    """A constant as a tensor: integers are int32 in MIL."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    result = torch.as_tensor(value)
    return result.to(torch.int32) if result.dtype == torch.int64 else result

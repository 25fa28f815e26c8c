"""Shared parts of all rules: the decorator that collects rules, their exception, and the conversion of constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = Callable[..., Any]


class UnsupportedError(Exception):
    """Operation, or variant of an operation, without a rule."""


def into(table: dict[str, Rule]) -> Callable[[Rule], Rule]:
    """Return a decorator that adds a rule to `table` under the name of its function."""

    def rule(function: Rule) -> Rule:
        table[function.__name__] = function
        return function

    return rule


def tensor(value: Any) -> Any:
    """Convert a constant to a torch tensor. Integers become int32, the integer type of MIL."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    result = torch.as_tensor(value)
    return result.to(torch.int32) if result.dtype == torch.int64 else result

"""How far a long piece of work is: what library code reports, and what a command shows of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[int, int], None]  # done, total
Step = Callable[[str, str], AbstractContextManager[Progress]]  # name, detail


def silent(name: str, detail: str) -> AbstractContextManager[Progress]:
    """A Step that shows nothing."""
    return nullcontext(lambda done, total: None)

"""Progress of long operations: the callbacks that library code calls and commands implement."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[int, int], None]  # done, total
Step = Callable[[str, str], AbstractContextManager[Progress]]  # name, detail


def silent(name: str, detail: str) -> AbstractContextManager[Progress]:
    """Return a context manager whose progress callback shows nothing: the default `Step`."""
    return nullcontext(lambda done, total: None)

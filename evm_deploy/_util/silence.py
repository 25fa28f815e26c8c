"""Converters log, warn, print and draw progress bars about themselves; what a user must know, we say.

They also keep state for the whole process (tracers, registries, the block that is being built), so that one thread at a
time may be in them. Other threads are never silenced: what is put in place here asks which thread it is that speaks.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

#: Held by the thread that is in a converter, or runs a torch module: torch's tracer takes over what others call.
one_at_a_time = threading.RLock()


class _Muted(threading.local):
    """depth: how many `quiet` blocks this thread is in."""

    depth = 0


_muted = _Muted()


@contextlib.contextmanager
def silence_libraries() -> Iterator[None]:
    """Inside, of this thread only errors come through: no logging below that, no warnings, no stdout, no tqdm bars.

    One thread at a time, the others wait; a thread that is inside may enter again. When the last leaves, nothing is
    left in place.
    """
    with one_at_a_time:
        _muted.depth += 1
        try:
            with contextlib.nullcontext() if _muted.depth > 1 else _in_place():
                yield
        finally:
            _muted.depth -= 1


@contextlib.contextmanager
def _in_place() -> Iterator[None]:
    with _logging(), _warnings(), _stdout(), _bars():
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    def handle(original: Callable[..., None], logger: logging.Logger, record: logging.LogRecord) -> None:
        if not _muted.depth or record.levelno > logging.WARNING:
            original(logger, record)

    with _wrapped(logging.Logger, "handle", handle):
        yield


class _ThisThread:
    """Stands for the pattern of a warning's text in a filter: it matches every text, from a muted thread."""

    def match(self, text: str) -> bool:
        return _muted.depth > 0


_IGNORED: Any = ("ignore", _ThisThread(), Warning, None, 0)


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """A filter and no `catch_warnings`, which would bring back old filters under the feet of other threads.

    Converters use that one themselves: where they bring ours back, it matches nothing, and goes the next time.
    """
    filters: Any = warnings.filters
    filters.insert(0, _IGNORED)
    try:
        yield
    finally:
        filters = warnings.filters
        while _IGNORED in filters:
            filters.remove(_IGNORED)


class _Stdout:
    """A stream that drops what muted threads write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if _muted.depth else self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _stdout() -> Iterator[None]:
    stream = sys.stdout
    if stream is None:
        yield
        return
    ours: Any = _Stdout(stream)
    sys.stdout = ours
    try:
        yield
    finally:
        if sys.stdout is ours:  # else another thread has put its own there
            sys.stdout = stream


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    def initialise(original: Callable[..., None], bar: Any, *args: Any, **options: Any) -> None:
        original(bar, *args, **({**options, "disable": True} if _muted.depth else options))

    bar: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    with contextlib.nullcontext() if bar is None else _wrapped(bar, "__init__", initialise):
        yield


@contextlib.contextmanager
def _wrapped(owner: type, name: str, function: Callable[..., None]) -> Iterator[None]:
    """The method `name` of `owner` goes through `function`, which gets the original first."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **options: Any) -> None:
        function(original, self, *args, **options)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)

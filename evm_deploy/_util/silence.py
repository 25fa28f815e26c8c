"""Silence the logging, warnings, prints and progress bars of converters, in one thread.

Converters also keep process-wide state (tracers, registries, the block under construction), so only one thread at a
time may run a converter. Output of other threads passes: every hook of this module checks the calling thread.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

#: Held by the thread that runs a converter or a torch module: torch's tracer also records the calls of other threads.
one_at_a_time = threading.RLock()


class _Muted(threading.local):
    """Nesting depth of `silence_libraries` blocks in this thread. level: the highest of the log records they hide."""

    depth = 0
    level = logging.NOTSET


_muted = _Muted()


@contextlib.contextmanager
def silence_libraries(level: int = logging.WARNING) -> Iterator[None]:
    """Context manager that hides the output of this thread, except errors.

    Hidden are log records up to `level`, Python warnings, stdout and tqdm bars. level: ERROR for a library that logs
    what it also raises. Only one thread can be inside; other threads wait. The same thread may enter again. The
    outermost exit removes all hooks.
    """
    with one_at_a_time:
        outer, _muted.level = _muted.level, max(_muted.level, level)
        _muted.depth += 1
        try:
            with contextlib.nullcontext() if _muted.depth > 1 else _in_place():
                yield
        finally:
            _muted.depth -= 1
            _muted.level = outer


@contextlib.contextmanager
def _in_place() -> Iterator[None]:
    with _logging(), _warnings(), _stdout(), _bars():
        yield


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    def handle(original: Callable[..., None], logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno > _muted.level:
            original(logger, record)

    with _wrapped(logging.Logger, "handle", handle):
        yield


class _ThisThread:
    """Message pattern of a warnings filter that matches every text in a muted thread, and no text elsewhere."""

    def match(self, text: str) -> bool:
        return _muted.depth > 0


_IGNORED: Any = ("ignore", _ThisThread(), Warning, None, 0)


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """Insert a warnings filter. `catch_warnings` is no alternative: it would restore old filters for all threads.

    Converters use `catch_warnings` themselves. If a converter restores this filter later, the filter matches nothing,
    and the next call removes it.
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
    """Stream that drops all output of muted threads."""

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
        if sys.stdout is ours:  # otherwise another thread has replaced the stream
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
    """Replace the method `name` of `owner` by `function`, whose first argument is the original method."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **options: Any) -> None:
        function(original, self, *args, **options)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)

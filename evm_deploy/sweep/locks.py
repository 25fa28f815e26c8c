"""Locks between the processes of this host, so that nothing else of evm-deploy runs beside a measurement.

A lock ends with its process, however it ends. There are none on Windows.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from platform import node

from evm_deploy._util.files import cache_folder, writable_cache

TURN, CORES = "turn", "cores"


@contextlib.contextmanager
def held(name: str, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Context manager: hold the lock `name`. Yields whether it is held: always, if the caller waits for it.

    shared: together with others who share it. Without `wait`, the lock of another holder is not waited for.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    folder = writable_cache(cache_folder() / "locks")
    file = folder / re.sub(r"[^\w.+-]", "_", f"{node()}-{name}")  # a home folder may be that of several hosts
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Context manager: have the cores of this host, as far as `beside_others` and `alone` are asked for them.

    Who waits here has the turn: nobody else begins until the work in progress has ended and this block is left.
    """
    with held(TURN), held(CORES):
        yield


@contextlib.contextmanager
def beside_others() -> Iterator[None]:
    """Context manager: work on the cores of this host at the same time as others, but never beside a measurement."""
    with contextlib.ExitStack() as stack:
        with held(TURN):
            stack.enter_context(held(CORES, shared=True))
        yield

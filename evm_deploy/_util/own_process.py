"""Settings of the processes that evm-deploy starts: its commands and their workers."""

from __future__ import annotations

import atexit
import contextlib
import gc
import sys
from collections.abc import Iterator

_own = False


def set_up_own_process() -> None:
    """Set up this process as one of evm-deploy's own: a command or a worker, which runs no code of a host program.

    From now on `not_installed` hides packages. Garbage is collected after 50,000 new objects, and old objects a
    thousand times as rarely: a trace makes millions of objects that live on; with Python's 700, collections took a
    tenth of the CPU time of an export of the demo. The collection at exit is left out: it took a third of a second.
    """
    global _own
    _own = True
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.disable)


@contextlib.contextmanager
def not_installed(*packages: str) -> Iterator[None]:
    """Context manager in which an import of `packages` fails as if they were not installed, in a process of our own.

    For a library that imports every package that it could work with. Packages that are imported already stay. In a
    process of others all is as ever: they may need what the library does with these packages.
    """
    hidden = [name for name in packages if _own and name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: ModuleNotFoundError
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)

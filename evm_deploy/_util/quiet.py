"""Converters log, warn, print and draw progress bars about themselves; what a user must know, we say."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from functools import partialmethod
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, only errors come through: no logging below that, no warnings, no stdout, no tqdm bars."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    bar: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bar is None:
        yield
        return
    original = bar.__init__
    bar.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        bar.__init__ = original

"""What was tried to break evm-deploy: docs/reliability.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def chosen(parser: argparse.ArgumentParser, names: list[str], known: Iterable[str]) -> list[str]:
    """The names that were asked for, else all that are known. Ends the program for others."""
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is unknown; choose from: {', '.join(known)}")
    return names or list(known)

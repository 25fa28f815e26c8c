"""Scripts that try to break evm-deploy; docs/reliability.md has the results."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def chosen(parser: argparse.ArgumentParser, names: list[str], known: Iterable[str]) -> list[str]:
    """Return the given names, or all known names if none is given. Ends the program if a name is unknown."""
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is unknown; choose from: {', '.join(known)}")
    return names or list(known)

"""Set up roots of other platforms: python -m tests.platforms setup NAME.."""

from __future__ import annotations

import sys

from tests.platforms.roots import ROOTS

if __name__ == "__main__":
    for name in sys.argv[2:]:
        ROOTS[name].setup()

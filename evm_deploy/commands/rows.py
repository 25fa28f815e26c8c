"""Print the rows of a command's JSON array one by one, as they come."""

from __future__ import annotations

import sys
from textwrap import indent
from typing import Any

from evm_deploy._util.schema import strict_json
from evm_deploy._util.text import escape_controls
from evm_deploy.errors import EvmError


class Rows:
    """Rows of a JSON array, each printed on stdout as soon as it is known, if `json`: a camera has no last one.

    The end of the `with` block closes the array, also after an error. failed: number of rows with an error.
    """

    def __init__(self, json: bool) -> None:
        self._json, self._count, self.failed = json, 0, 0

    def add(self, row: dict[str, Any]) -> None:
        """Print a row."""
        if self._json:
            print(",\n" if self._count else "[\n", indent(strict_json(row, indent=1), " "), sep="", end="", flush=True)
        self._count += 1

    def fail(self, row: dict[str, Any], error: EvmError) -> None:
        """Print a row with its error, and the error on stderr."""
        self.failed += 1
        self.add({**row, "error": str(error)})
        print(escape_controls(f"evm-run: {error}"), file=sys.stderr)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *error: object) -> None:
        if self._json:
            print("\n]" if self._count else "[]", flush=True)

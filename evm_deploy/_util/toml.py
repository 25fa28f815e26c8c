"""Read TOML files of users, and check their keys and types."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from evm_deploy._util.text import one_of
from evm_deploy.errors import UsageError

TYPE_NAMES = {str: "text", int: "a whole number", list: "a list of texts"}


class Readable(Protocol):
    """File on disk or inside a package."""

    def read_text(self, encoding: str) -> str:
        """Return the decoded content of the file. Raises OSError, UnicodeDecodeError."""
        ...


def read_toml(path: Readable, what: str) -> dict[str, Any]:
    """Parse a TOML file. `what`: the flag that named the file, for error messages. Raises UsageError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Notepad writes the mark
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{what} {path} is not TOML: {error}") from error
    return content


def checked(
    where: str, content: Mapping[str, Any], keys: Mapping[str, type], required: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the values of a table whose keys are all known and of the right type. Raises UsageError naming the key."""
    for key in required:
        if key not in content:
            raise UsageError(f"{where} has no {key!r}", f"required keys: {', '.join(required)}")
    for key, value in content.items():
        kind = keys[one_of(f"{where}: key", key, keys)]
        parts = value if isinstance(value, list) else ()
        if type(value) is not kind or any(type(part) is not str for part in parts):  # isinstance accepts True as int
            raise UsageError(f"{where}: {key} must be {TYPE_NAMES[kind]}, got {value!r}")
    return dict(content)

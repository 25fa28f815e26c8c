"""TOML files of users: read, and checked against the keys and types that are known."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from evm_deploy._util.text import one_of
from evm_deploy.errors import UsageError

TYPE_NAMES = {str: "text", int: "a whole number", list: "a list of texts"}


class Readable(Protocol):
    """A file, also one inside a package."""

    def read_text(self, encoding: str) -> str: ...


def read_toml(path: Readable, what: str) -> dict[str, Any]:
    """What a TOML file holds. `what`: the flag that named it. Raises UsageError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{what} {path} is not TOML: {error}") from error
    return content


def checked(
    where: str, content: Mapping[str, Any], keys: Mapping[str, type], required: Iterable[str] = ()
) -> dict[str, Any]:
    """The values of a table, if all of its keys are known and of their type. Raises UsageError naming the key."""
    for key in required:
        if key not in content:
            raise UsageError(f"{where} has no {key!r}", f"it needs: {', '.join(required)}")
    for key, value in content.items():
        kind = keys[one_of(f"{where}: key", key, keys)]
        parts = value if isinstance(value, list) else ()
        if type(value) is not kind or any(type(part) is not str for part in parts):  # True is no number
            raise UsageError(f"{where}: {key} must be {TYPE_NAMES[kind]}, got {value!r}")
    return dict(content)

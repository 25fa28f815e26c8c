"""Validate untrusted JSON against a JSON Schema. The first fault raises an InvalidError that names its key path."""

from __future__ import annotations

import json
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

Definition = dict[str, Any]
TEXT: Definition = {"type": "string"}
TRUTH: Definition = {"type": "boolean"}


class InvalidError(ValueError):
    """Fault in a JSON value. `where` is its key path, such as inputs[0].shape."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where:.200} {text}")
        self.where = where


@dataclass(frozen=True)
class Schema:
    """JSON Schema that is called with a value, and raises InvalidError unless the value is valid.

    The first call reads and compiles the schema.
    """

    definition: Callable[[], Definition]

    def __call__(self, value: Any) -> None:
        from fastjsonschema import JsonSchemaValueException

        taken = _taken(value)
        try:
            _compiled(self.definition, detailed=False)(taken)
        except JsonSchemaValueException as error:
            raise self._fault(taken) from error

    def _fault(self, taken: Any) -> InvalidError:
        from fastjsonschema import JsonSchemaValueException

        try:
            _compiled(self.definition, detailed=True)(taken)
        except JsonSchemaValueException as error:
            return _invalid(error)
        return InvalidError("", "does not fit its schema")


@cache
def _compiled(definition: Callable[[], Definition], detailed: bool) -> Callable[[Any], Any]:
    """Compile the validator of a schema. Without `detailed` errors, compiling takes less than half the time."""
    import fastjsonschema

    return fastjsonschema.compile(definition(), use_default=False, use_formats=False, detailed_exceptions=detailed)


def published(package: str, file: str) -> Definition:
    """Read the schema from a file of a package. The package may be inside a zip."""
    definition: Definition = json.loads(pkgutil.get_data(package, file) or b"")
    return definition


def strict_json(value: Any, **options: Any) -> str:
    """Return `value` as JSON text that every parser reads: NaN and infinities become null. options: of json.dumps."""
    return json.dumps(_nulled(value), allow_nan=False, **options)


def lenient_json(text: str | bytes) -> Any:
    """Parse JSON; NaN and infinities, which older versions wrote, become None. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=lambda name: None)


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def keys(**definitions: Definition) -> Definition:
    """Return the schema of an object in which all these keys are required."""
    return {"type": "object", "required": [*definitions], "properties": definitions}


class _Float(float):
    """Number that was written with a decimal point. JSON Schema accepts 224.0 as an integer; this class does not."""

    def is_integer(self) -> bool:
        return False


@dataclass(frozen=True)
class _NotFinite:
    """Stand-in for NaN and Infinity, which have no JSON type. As a float, NaN would pass every bound of a schema."""

    value: float

    def __repr__(self) -> str:
        return str(self.value)


def _taken(value: Any) -> Any:
    """Convert a value for validation, so that 1.0 is not an integer, and NaN and Infinity are not numbers."""
    if isinstance(value, dict):
        return {key: _taken(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_taken(item) for item in value]
    if isinstance(value, float):
        return _Float(value) if math.isfinite(value) else _NotFinite(value)
    return value


def _invalid(error: Any) -> InvalidError:
    """Convert a JsonSchemaValueException to an InvalidError. For a missing key, `where` is the path of that key."""
    where = error.name.removeprefix("data").removeprefix(".")
    if error.rule == "required":
        missing = next(key for key in error.definition["required"] if key not in error.value)
        return InvalidError(f"{where}.{missing}" if where else missing, "is missing")
    if error.rule == "not":
        return InvalidError(where, error.definition["description"])
    return InvalidError(where, f"{error.message.removeprefix(error.name).strip()}, is {error.value!r:.60}")

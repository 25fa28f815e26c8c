"""Checks of untrusted JSON against a JSON Schema: the first fault is an InvalidError, which names the place."""

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
    """A fault in a value, and `where`: its key path, such as inputs[0].shape."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where:.200} {text}")
        self.where = where


@dataclass(frozen=True)
class Schema:
    """Called with a value, raises InvalidError unless it fits. Read and compiled at the first call."""

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
    """The check of a schema, compiled in less than half the time where its errors need not say what is wrong."""
    import fastjsonschema

    return fastjsonschema.compile(definition(), use_default=False, use_formats=False, detailed_exceptions=detailed)


def published(package: str, file: str) -> Definition:
    """The schema in a file of a package, which may be in a zip."""
    definition: Definition = json.loads(pkgutil.get_data(package, file) or b"")
    return definition


def keys(**definitions: Definition) -> Definition:
    """An object that has all of these keys."""
    return {"type": "object", "required": [*definitions], "properties": definitions}


class _Float(float):
    """A number that was written with a point: no integer, though JSON Schema takes 224.0 for one."""

    def is_integer(self) -> bool:
        return False


@dataclass(frozen=True)
class _NotFinite:
    """NaN or Infinity: of no type of JSON, and every bound lets NaN pass."""

    value: float

    def __repr__(self) -> str:
        return str(self.value)


def _taken(value: Any) -> Any:
    """The value as a schema is to take it: 1.0 is no integer, NaN and Infinity are no numbers."""
    if isinstance(value, dict):
        return {key: _taken(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_taken(item) for item in value]
    if isinstance(value, float):
        return _Float(value) if math.isfinite(value) else _NotFinite(value)
    return value


def _invalid(error: Any) -> InvalidError:
    """A JsonSchemaValueException as an InvalidError; the place of a key that is missing is the key's."""
    where = error.name.removeprefix("data").removeprefix(".")
    if error.rule == "required":
        missing = next(key for key in error.definition["required"] if key not in error.value)
        return InvalidError(f"{where}.{missing}" if where else missing, "is missing")
    if error.rule == "not":
        return InvalidError(where, error.definition["description"])
    return InvalidError(where, f"{error.message.removeprefix(error.name).strip()}, is {error.value!r:.60}")

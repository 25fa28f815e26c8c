"""Conversion of values that Python users pass, such as Path, numpy scalars and lists, to the types of dataclass fields.

Each converter takes the name of the value for error messages and the value. It returns the converted value, or raises
UsageError for a value of another kind.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from evm_deploy.errors import UsageError

Converter = Callable[[str, Any], Any]
SHOWN = 60  # characters of a wrong value in an error message


def text(what: str, value: Any) -> str:
    """Return a text, also from an enumeration of texts. Raises UsageError for other types."""
    if not isinstance(value, str):
        raise wrong(what, value, "a text")
    return str(getattr(value, "value", value))


def path_text(what: str, value: Any) -> str:
    """Return a path as text, from a text or a Path. Raises UsageError for other types, bytes, and an empty path."""
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str) or not found or "\0" in found:
        raise wrong(what, value, "a path")
    return found


def whole(what: str, value: Any) -> int:
    """Return a whole number from an int or a numpy integer. Raises UsageError for other types, such as 1.0 or True."""
    try:
        if _truth(value):
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError) as error:
        raise wrong(what, value, "a whole number") from error


def number(what: str, value: Any) -> float:
    """Return a finite float from an int, a float or a numpy scalar. Raises UsageError for other types, and for NaN."""
    try:
        if _truth(value) or isinstance(value, Iterable):  # text, bytes, arrays
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong(what, value, "a number") from error
    if not math.isfinite(found):
        raise wrong(what, value, "a finite number")
    return found


def truth(what: str, value: Any) -> bool:
    """Return True or False, also from a numpy boolean. Raises UsageError for other types, such as 1."""
    if not _truth(value):
        raise wrong(what, value, "True or False")
    return bool(value)


def listed(what: str, value: Any, each: Converter) -> tuple[Any, ...]:
    """Return the items of a list, tuple, array or range as a tuple, each converted by `each`.

    Raises UsageError for a text, for a mapping or set, whose order says nothing, and for what cannot be iterated.
    """
    if isinstance(value, (str, bytes, Mapping, set, frozenset)) or not isinstance(value, Iterable):
        raise wrong(what, value, "a list")
    try:
        items = list(value)
    except TypeError as error:  # numpy arrays without axes say that they can be iterated
        raise wrong(what, value, "a list") from error
    return tuple(each(f"{what}[{i}]", item) for i, item in enumerate(items))


def label(what: str, value: Any) -> str:
    """Return the name of a class from a text or a whole number. Raises UsageError for other types."""
    return str(value) if isinstance(value, str) else str(whole(what, value))


def _truth(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy 1 and 2


def wrong(what: str, value: Any, wanted: str) -> UsageError:
    """Return the error for a value of the wrong kind. Long values are cut."""
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + ".."
    return UsageError(f"{what} is {shown} ({type(value).__name__}), it must be {wanted}")


#: Annotation of a dataclass field -> its converter. ` | None` behind an annotation also accepts None.
BY_ANNOTATION: dict[str, Converter] = {
    "str": text,
    "int": whole,
    "float": number,
    "bool": truth,
    "str | Path": path_text,
    "tuple[int, ...]": lambda what, value: listed(what, value, whole),
    "tuple[str, ...]": lambda what, value: listed(what, value, label),
}


NONE: Mapping[str, Converter] = {}


def convert_fields(instance: Any, names: Mapping[str, str], own: Mapping[str, Converter] = NONE) -> None:
    """Convert every field of a frozen dataclass in place, by its annotation or by its converter in `own`.

    names: field -> its name in error messages, by default the flag of the same name. Raises UsageError.
    """
    for each in fields(instance):
        value = getattr(instance, each.name)
        annotation = str(each.type)
        if value is None and annotation.endswith(" | None"):
            continue
        convert = own.get(each.name) or BY_ANNOTATION[annotation.removesuffix(" | None")]
        what = names.get(each.name, f"--{each.name.replace('_', '-')}")
        object.__setattr__(instance, each.name, convert(what, value))

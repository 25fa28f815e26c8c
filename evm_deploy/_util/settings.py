"""Settings of a runtime or target: fields of a frozen dataclass. Each field is also a flag and a key of --config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from evm_deploy._util.values import convert_fields
from evm_deploy.errors import UsageError

KEY = "flag"


@dataclass(frozen=True)
class Flag:
    """Command-line flag of a settings field.

    read(flag, text): converts the text to the value of the field. A boolean field does not use it. what: name of the
    requested feature in error messages, such as "CUDA graphs". here: true if the value is a path on this machine, which
    a remote machine does not have.
    """

    name: str
    help: str
    metavar: str | None = None
    read: Callable[[str, str], Any] = lambda flag, text: text
    what: str = ""
    here: bool = False


def setting(default: Any, flag: str, **facts: Any) -> Any:
    """Return a dataclass field with this default and the flag `Flag(flag, **facts)`."""
    return field(default=default, metadata={KEY: Flag(flag, **facts)})


class Settings:
    """Base class of settings: converts the values that Python users pass to the annotated types. Raises UsageError."""

    def __post_init__(self) -> None:
        convert_fields(self, {each.name: flag_of(each).name for each in fields(self)})  # type: ignore[arg-type]


def flag_of(each: Field[Any]) -> Flag:
    """Return the flag that `setting` stored in a dataclass field."""
    found: Flag = each.metadata[KEY]
    return found


def all_fields(kinds: Iterable[type | None]) -> dict[str, Field[Any]]:
    """Return the fields of several settings classes by name. If two classes share a name, the first one wins."""
    found: dict[str, Field[Any]] = {}
    for kind in kinds:
        for each in fields(kind) if kind else ():
            found.setdefault(each.name, each)
    return found


def help_of(name: str, kinds: Iterable[type | None]) -> str:
    """Return the help texts of all classes that have a field `name`, joined with semicolons, without repeats."""
    texts = [flag_of(each).help for kind in kinds if kind for each in fields(kind) if each.name == name]
    return "; ".join(dict.fromkeys(texts))


def add_flags(parser: argparse._ActionsContainer, kinds: Iterable[type | None]) -> None:
    """Add one flag per field to the parser. The flag of a boolean field inverts the default."""
    kinds = list(kinds)
    for each in all_fields(kinds).values():
        flag = flag_of(each)
        if isinstance(each.default, bool):
            facts: dict[str, Any] = {"action": "store_const", "const": not each.default, "default": each.default}
        else:
            facts = {"metavar": flag.metavar}
        parser.add_argument(flag.name, dest=each.name, help=help_of(each.name, kinds), **facts)


def given(args: argparse.Namespace, kinds: Iterable[type | None]) -> dict[str, Any]:
    """Return the parsed settings that differ from their default, by field name. Raises UsageError."""
    found = {}
    for name, each in all_fields(kinds).items():
        value, flag = getattr(args, name), flag_of(each)
        if value is not None and value != each.default:
            found[name] = flag.read(flag.name, value) if isinstance(value, str) else value
    return found


def changed(values: Mapping[str, Any], kinds: Iterable[type | None]) -> dict[str, Any]:
    """Return the entries of `values` that differ from the default of their field, and entries without a field."""
    known = all_fields(kinds)
    return {name: value for name, value in values.items() if name not in known or not same(value, known[name].default)}


def same(value: Any, default: Any) -> bool:
    """Test whether a value of any type is the default. Arrays, which have no single truth, are not."""
    return value is default or (isinstance(value, type(default)) and bool(value == default))


def number(flag: str, text: str) -> float:
    """Convert the text of a flag to a float. Raises UsageError."""
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not a number") from error


def whole(flag: str, text: str) -> int:
    """Convert the text of a flag to an integer. Raises UsageError."""
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not a whole number") from error


def wholes(flag: str, text: str) -> tuple[int, ...]:
    """Convert a comma-separated list to integers: `86,89` -> (86, 89). Raises UsageError."""
    return tuple(whole(flag, part) for part in text.split(","))

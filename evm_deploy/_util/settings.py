"""Settings of one's own: the fields of a frozen dataclass, each of which is also a flag and a key of --config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from evm_deploy.errors import UsageError

KEY = "flag"


@dataclass(frozen=True)
class Flag:
    """How a field is given on a command line. read(flag, text): its value; a field that is true or false needs none.

    what: as an error calls what the flag asks for, such as "CUDA graphs". here: whether it names a place on this
    machine, which another does not have.
    """

    name: str
    help: str
    metavar: str | None = None
    read: Callable[[str, str], Any] = lambda flag, text: text
    what: str = ""
    here: bool = False


def setting(default: Any, flag: str, **facts: Any) -> Any:
    """A field with this default and `Flag(flag, **facts)`."""
    return field(default=default, metadata={KEY: Flag(flag, **facts)})


def flag_of(each: Field[Any]) -> Flag:
    found: Flag = each.metadata[KEY]
    return found


def all_fields(kinds: Iterable[type | None]) -> dict[str, Field[Any]]:
    """The fields of several settings classes by name; a field that several have is that of the first."""
    found: dict[str, Field[Any]] = {}
    for kind in kinds:
        for each in fields(kind) if kind else ():
            found.setdefault(each.name, each)
    return found


def help_of(name: str, kinds: Iterable[type | None]) -> str:
    """The help texts of every class that has a field of this name."""
    texts = [flag_of(each).help for kind in kinds if kind for each in fields(kind) if each.name == name]
    return "; ".join(dict.fromkeys(texts))


def add_flags(parser: argparse._ActionsContainer, kinds: Iterable[type | None]) -> None:
    """Add a flag for each field. One that is true or false turns its default round."""
    kinds = list(kinds)
    for each in all_fields(kinds).values():
        flag = flag_of(each)
        if isinstance(each.default, bool):
            facts: dict[str, Any] = {"action": "store_const", "const": not each.default, "default": each.default}
        else:
            facts = {"metavar": flag.metavar}
        parser.add_argument(flag.name, dest=each.name, help=help_of(each.name, kinds), **facts)


def given(args: argparse.Namespace, kinds: Iterable[type | None]) -> dict[str, Any]:
    """The settings that were given: values that are not the default, by field. Raises UsageError."""
    found = {}
    for name, each in all_fields(kinds).items():
        value, flag = getattr(args, name), flag_of(each)
        if value is not None and value != each.default:
            found[name] = flag.read(flag.name, value) if isinstance(value, str) else value
    return found


def changed(values: Mapping[str, Any], kinds: Iterable[type | None]) -> dict[str, Any]:
    """Those of `values` that are not the default of their field."""
    known = all_fields(kinds)
    return {name: value for name, value in values.items() if name not in known or value != known[name].default}


def number(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not a number") from error


def whole(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not a whole number") from error


def wholes(flag: str, text: str) -> tuple[int, ...]:
    """`86,89` -> (86, 89)."""
    return tuple(whole(flag, part) for part in text.split(","))

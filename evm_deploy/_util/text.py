"""Text helpers: escaping for terminals, validated choices, sizes."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from evm_deploy.errors import UsageError


def escape_controls(text: object, keep: str = "\n") -> str:
    """Replace control characters, which terminals interpret, by U+FFFD. Characters in `keep` stay."""
    return "".join(each if each.isprintable() or each in keep else "\N{REPLACEMENT CHARACTER}" for each in str(text))


def one_of(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`. Raises UsageError with all choices and the closest one."""
    choices = tuple(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"did you mean {near[0]}?" if near else ""
    raise UsageError(f"{what} {value!r} is unknown; choose from: {', '.join(choices)}", hint)


def shortened(text: object, limit: int = 240) -> str:
    """Return `text` with its middle cut out if it is longer than `limit` characters."""
    whole = str(text)
    return whole if len(whole) <= limit else f"{whole[: limit // 2]} .. {whole[-limit // 2 :]}"


def count_text(count: int, noun: str) -> str:
    """Format a count with its noun: 1 value, 3 values."""
    return f"{count} {noun}" + "s" * (count != 1)


def some_of(names: Sequence[str], count: int = 4) -> str:
    """Return the first names with commas, and two dots for the others."""
    return ", ".join(names[:count]) + (", .." if len(names) > count else "")


def size_text(imgsz: tuple[int, int]) -> str:
    """Format an image size: (H, W) -> `HxW`."""
    return f"{imgsz[0]}x{imgsz[1]}"


def command(*words: str | Path) -> str:
    """Return a line that a POSIX shell splits into exactly these words, for messages that a user pastes.

    A path that begins with a hyphen gets `./` in front, so that no program takes it for a flag.
    """
    paths = (f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words)
    return shlex.join(paths)

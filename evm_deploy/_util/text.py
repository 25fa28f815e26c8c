"""Text from files and boards, made fit for a terminal."""

from __future__ import annotations


def printable(text: object, keep: str = "\n") -> str:
    """Characters that terminals obey, such as escape sequences, replaced; those in `keep` stay."""
    return "".join(each if each.isprintable() or each in keep else "\N{REPLACEMENT CHARACTER}" for each in str(text))

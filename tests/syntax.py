"""Syntax of Kotlin and Swift, by tree-sitter's grammars."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def parsed(language: str, source: bytes) -> Any:
    """The root node of `source` in `kotlin` or `swift`."""
    import tree_sitter

    grammar = tree_sitter.Language(import_module(f"tree_sitter_{language}").language())
    return tree_sitter.Parser(grammar).parse(source).root_node


def faults(language: str, source: bytes) -> list[str]:
    """Where `source` does not parse: line and what is wrong, or missing."""
    found, nodes = [], [parsed(language, source)]
    while nodes:
        node = nodes.pop()
        if node.is_error or node.is_missing:
            found.append(f"line {node.start_point[0] + 1}: {node}")
        nodes += node.children if node.has_error else []
    return found

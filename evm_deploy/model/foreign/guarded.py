"""Import statements that a module can do without: those in a `try` whose failure its code is prepared for."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator, Sequence
from functools import lru_cache

Function = ast.FunctionDef | ast.AsyncFunctionDef
Import = ast.Import | ast.ImportFrom


@lru_cache(maxsize=256)
def dispensable_imports(file: str) -> frozenset[int]:
    """Return the lines of a file's import statements that stand in a `try` and that the file can do without.

    A file cannot do without a name that it uses while it is imported, such as in `@triton.jit` outside of an `if`. A
    `try` whose handler imports a module of the same last name is two ways to one module, and says nothing.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    used = set(_names_used_by(tree.body))
    found: set[int] = set()
    for attempt in ast.walk(tree):
        if not isinstance(attempt, ast.Try):
            continue
        replaced, retried = set(_replaced_in(attempt.handlers)), set(_modules_of(_imports_in(attempt.handlers)))
        for node in _imports_in(attempt.body):
            if not (_bound_by(node) & used - replaced or set(_modules_of([node])) & retried):
                found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(found)


def _imports_in(nodes: Sequence[ast.AST]) -> list[Import]:
    return [each for node in nodes for each in ast.walk(node) if isinstance(each, Import)]


def _modules_of(imports: Sequence[Import]) -> Iterator[str]:
    """Yield the last names of the modules that statements import."""
    for node in imports:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
        yield from (name.rpartition(".")[2] for name in names)


def _bound_by(node: Import) -> set[str]:
    return {each.asname or each.name.partition(".")[0] for each in node.names}


def _replaced_in(handlers: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names that the handlers of a `try` define, other than as None."""
    for node in (each for handler in handlers for each in ast.walk(handler)):
        if isinstance(node, Function | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _names_used_by(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements read when they are carried out, those in an `if` or a `try` left out."""
    for statement in statements:
        parts: list[ast.AST] = [statement]
        if isinstance(statement, Function):
            parts = [*statement.decorator_list, statement.args]
        elif isinstance(statement, ast.ClassDef):
            parts = [*statement.decorator_list, *statement.bases]
            yield from _names_used_by(statement.body)
        elif isinstance(statement, ast.If | ast.Try):
            parts = []
        yield from (node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name))

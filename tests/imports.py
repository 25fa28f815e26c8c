"""The imports of evm_deploy as its sources say them: at the top, in functions, under TYPE_CHECKING, and lazy names."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import evm_deploy

PACKAGE = Path(evm_deploy.__file__).parent


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """Imports of a source: modules of `known`, and the top names of others."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports are not used"
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "lazy_names":
            names = [(each.value, each.value) for each in ast.walk(node) if isinstance(each, ast.Constant)]
            names = [pair for pair in names if pair[0] in known]
        else:
            continue
        for whole, module in names:
            found.add(whole if whole in known else module if module in known else module.partition(".")[0])
    return found


@cache
def edges() -> dict[str, set[str]]:
    """Module -> what it imports."""
    known = set(modules())
    return {name: imports(path.read_text(encoding="utf-8"), known) - {name} for name, path in modules().items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, however long the way (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other in graph and other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return found

"""Check the prose of the package: docstrings, error messages, help texts and documentation pages, by rule.

A docstring's first sentence says what is done, by verb and object; an error message says what is wrong. CONTRIBUTING.md
has all rules, this file those that a script can check.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "evm_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(path for name in ("tests", "benchmarks", "reliability") for path in (ROOT / name).rglob("*.py"))
# A relative clause, a genitive without its noun, or a pronoun without an antecedent.
BAD_START = re.compile(
    r"(?:What|Those|Of|As|It|Its|They|Their|This|That|These|Which|Whose|Who|He|She|We|You|Such)\b(?!-)"
)
PICTURE = re.compile(r"\bpictures?\b", re.IGNORECASE)
DRAWN = {"docs/embed/web.md", "docs/embed/ios.md"}  # a drawn picture is meant
PERSISTED = ("picture.png", "picture.pixels")  # file and tensor of a self-test: names of the bundle's format


def first_sentence(text: str) -> str:
    paragraph = re.split(r"\n\s*\n", text.strip())[0]
    return " ".join(re.split(r"(?<=[.:])\s", paragraph, maxsplit=1)[0].split())


def documented(module: Path) -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of a module and of its public classes, functions and methods."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    name = module.relative_to(ROOT).as_posix()
    yield name, tree
    stack = [(name, node) for node in tree.body]
    while stack:
        inside, node = stack.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield f"{inside}:{node.name}", node
        if isinstance(node, ast.ClassDef):
            stack += [(f"{inside}:{node.name}", each) for each in node.body]


def test_everything_public_is_documented():
    bare = [name for module in MODULES for name, node in documented(module) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not bare, f"{len(bare)} without a docstring:\n" + "\n".join(bare)


def every_docstring(module: Path) -> Iterator[tuple[str, str]]:
    """(file:line, docstring) of a module and of everything in it, private or not."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text:
                yield f"{module.relative_to(ROOT).as_posix()}:{node.body[0].lineno}", text


def test_docstrings_begin_with_what_is_done():
    found = [
        f"{where}: {first_sentence(text)}"
        for module in [*MODULES, *SCRIPTS]
        for where, text in every_docstring(module)
        if BAD_START.match(text)
    ]
    assert not found, f"{len(found)} docstrings:\n" + "\n".join(found)


def messages(module: Path) -> Iterator[tuple[str, str]]:
    """(file:line, text) of the errors that a module raises and of its help texts, `{}` in the place of values."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = list(node.args) if called.endswith("Error") else []
        texts += [each.value for each in node.keywords if each.arg == "help"]
        for value in texts:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                text = value.value
            elif isinstance(value, ast.JoinedStr):
                text = "".join(each.value if isinstance(each, ast.Constant) else "{}" for each in value.values)  # type: ignore[misc]
            else:
                continue
            yield f"{module.relative_to(ROOT).as_posix()}:{value.lineno}", text


def test_messages_begin_with_what_is_wrong():
    found = [
        f"{where}: {text}"
        for module in MODULES
        for where, text in messages(module)
        if BAD_START.match(text[:1].upper() + text[1:])
    ]
    assert not found, f"{len(found)} messages:\n" + "\n".join(found)


@pytest.mark.parametrize("suffix", ["py", "md", "cpp", "h", "hpp", "kt", "swift", "ts", "html"])
def test_images_are_called_images(suffix):
    folders = [ROOT / name for name in ("evm_deploy", "docs", "samples", "sdk", "native", "benchmarks", "reliability")]
    files = [*ROOT.glob(f"*.{suffix}"), *(path for folder in folders for path in folder.rglob(f"*.{suffix}"))]
    found = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        if "node_modules" in name or name in DRAWN:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if PICTURE.search(re.sub("|".join(map(re.escape, PERSISTED)), "", line)):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------------------------ glossary

GLOSSARY = ROOT / "docs" / "glossary.md"
#: Terms in everyday use, which need no link where they first appear.
EVERYDAY = {"accuracy", "precision", "target", "task", "platform", "host", "runtime", "record", "engine", "artifact"}


def terms() -> list[str]:
    return re.findall(r"^## (.+)$", GLOSSARY.read_text(encoding="utf-8"), re.M)


def pages_in_reading_order() -> list[Path]:
    """Return the pages of the documentation site in the order of its navigation, without the glossary."""
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    return [ROOT / name for name in named if ROOT / name != GLOSSARY]


def prose(page: Path) -> str:
    """Return a page's text without code, headings and the targets of links."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^(?: {4}|#).*$", "", text, flags=re.M)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


@pytest.mark.parametrize("term", terms())
def test_terms_are_linked_where_they_first_appear(term):
    words = re.compile(rf"\b{re.escape(term)}s?\b", re.IGNORECASE)
    first = next((page for page in pages_in_reading_order() if words.search(prose(page))), None)
    assert first, "no page uses the term: it needs no entry"
    linked = re.compile(rf"\[[^\]]*\b{re.escape(term)}s?\b[^\]]*\]\([^)]*glossary\.md[^)]*\)", re.IGNORECASE)
    assert term in EVERYDAY or linked.search(first.read_text(encoding="utf-8")), first.relative_to(ROOT)


def test_the_glossary_is_in_alphabetical_order():
    assert terms() == sorted(terms(), key=str.lower)

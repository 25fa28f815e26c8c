"""Lay out the pages of the documentation site in build/site, with the paths that they have in the repository.

    python docs/site.py && mkdocs build --strict

Pages link to each other, and to schemas and samples, by paths that work in the repository. So the site's source is a
copy of the same tree: every page in docs/ and at the top, and every file that one of them links to.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
TOP = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|<img[^>]+src=\"([^\"]+)\"")


def links(page: Path) -> set[Path]:
    """Return the files of the repository that a Markdown page links to."""
    found = {first or second for first, second in LINK.findall(page.read_text(encoding="utf-8"))}
    paths = (page.parent / target for target in found if "://" not in target)
    return {path.resolve() for path in paths if path.is_file()}


def main() -> None:
    """Copy every page, and every file that a page links to."""
    shutil.rmtree(SITE, ignore_errors=True)
    pages = {ROOT / name for name in TOP} | set((ROOT / "docs").rglob("*.md"))
    files = pages.union(*(links(page) for page in pages))
    for path in sorted(files):
        copy = SITE / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


if __name__ == "__main__":
    main()

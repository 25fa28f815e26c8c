"""List of all layouts, explicit; the value of --layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from evm_deploy._util.text import one_of
from evm_deploy.bundle.manifest import Manifest
from evm_deploy.errors import UsageError
from evm_deploy.export import triton
from evm_deploy.export.layout import Layout
from evm_deploy.export.plan import ExportPlan

LAYOUTS = {layout.name: layout for layout in (triton.LAYOUT,)}


def parse_layout(text: str) -> tuple[Layout, PurePosixPath]:
    """Parse `NAME` or `NAME:DIR`. Returns the layout and the folder of the bundles on the server. Raises UsageError."""
    name, colon, given = text.partition(":")
    layout = LAYOUTS[one_of("--layout", name, LAYOUTS)]
    root = PurePosixPath(given if colon else layout.root)
    if not root.is_absolute() or not str(root).isprintable():
        raise UsageError(
            f"--layout {text!r}: {given!r} is not an absolute path on the server",
            f"use --layout {name}:{layout.root}",
        )
    return layout, root


def check_layout(plan: ExportPlan) -> None:
    """Raise UsageError if the plan's bundle cannot have the plan's layout."""
    if plan.layout is not None:
        parse_layout(plan.layout)[0].check(plan)


def arranged(plan: ExportPlan, manifest: Manifest, folder: Path, name: str) -> Manifest:
    """Arrange the bundle in `folder`, which will be called `name`, as the plan's layout says. Returns the manifest."""
    if plan.layout is None:
        return manifest
    layout, root = parse_layout(plan.layout)
    return layout.arrange(folder, manifest, str(root / name))


def files_of_layout(plan: ExportPlan) -> Mapping[str, str]:
    """Return the files that the plan's layout puts into a bundle -> their content."""
    return parse_layout(plan.layout)[0].files if plan.layout else {}

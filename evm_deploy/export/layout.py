"""Layout of a bundle: where its files lie, for a server that takes the folder as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evm_deploy.bundle.manifest import Manifest

if TYPE_CHECKING:
    from evm_deploy.export.plan import ExportPlan


@dataclass(frozen=True)
class Layout:
    """An arrangement of a bundle's files, with the files that one server needs beside them. The result is a bundle.

    name: value of --layout. root: folder on the server that holds the bundles, unless --layout NAME:DIR names another.
    files: the server's own files -> their content, for the bundle's README.

    `check(plan)`: raise UsageError for a plan whose bundle the server cannot serve.
    `arrange(folder, manifest, where)`: arrange the files of the bundle in `folder`, before its manifest is written.
    where: path of the bundle on the server. Returns the manifest with the new places. Raises UsageError.
    """

    name: str
    root: str
    files: Mapping[str, str]
    check: Callable[[ExportPlan], None]
    arrange: Callable[[Path, Manifest, str], Manifest]

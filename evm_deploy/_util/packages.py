"""Versions of installed packages, found without importing the packages."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of all modules in `names` that are installed."""
    return {name: version(name) for name in names if find_spec(name)}


def version(module: str) -> str:
    """Return the version of the installed distribution that provides `module`.

    The distribution may have another name: onnxruntime-gpu provides onnxruntime. Returns `unknown` if no distribution
    provides the module.
    """
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        brought_by = metadata.packages_distributions().get(module)
        return metadata.version(brought_by[0]) if brought_by else "unknown"

"""Which packages are here, and in which version, without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those modules that can be imported."""
    return {name: version(name) for name in names if find_spec(name)}


def version(module: str) -> str:
    """Of the distribution that brings a module: of its name, or of another, as onnxruntime-gpu brings onnxruntime.

    `unknown` for a module that no distribution brings.
    """
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        brought_by = metadata.packages_distributions().get(module)
        return metadata.version(brought_by[0]) if brought_by else "unknown"

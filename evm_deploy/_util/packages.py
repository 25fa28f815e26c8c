"""Versions of installed packages, found without importing them, and commands that install evm-deploy itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from evm_deploy._util.files import package_folders
from evm_deploy._util.text import command

DISTRIBUTION = "evm-deploy"
UNKNOWN = "CHECKOUT"


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
        return next((each.version for each in metadata.distributions() if provides(each, module)), "unknown")


def provides(distribution: metadata.Distribution, module: str) -> bool:
    """Test whether an installed distribution provides the top-level module `module`.

    Reads `top_level.txt`, else the list of files, as text. `metadata.packages_distributions` makes a path of each file
    of each distribution for the same answer: 0.4 CPU seconds beside torch.
    """
    declared = distribution.read_text("top_level.txt")
    if declared:
        return module in declared.split()
    listed = distribution.read_text("RECORD") or ""
    return re.search(rf"^{re.escape(module)}[/.]", listed, re.MULTILINE) is not None


def install_hint(extra: str = "") -> str:
    """Return the command that installs evm-deploy with an extra, from where it was installed. It is on no index."""
    explained = f"  with {UNKNOWN}: folder or wheel of evm-deploy" if source() == UNKNOWN else ""
    return command("pip", "install", source() + (f"[{extra}]" if extra else "")) + explained


def upgrade_hint() -> str:
    """Return what to do for a file that needs a newer evm-deploy."""
    return f"get a newer evm-deploy, then:  {command('pip', 'install', '-U', source())}"


@cache
def source() -> str:
    """Return the checkout that this package runs from, else the wheel or folder that it was installed from.

    UNKNOWN if there is none on this machine, as for the agent on a board.
    """
    for folder in package_folders():
        project = folder.parent / "pyproject.toml"
        if project.is_file() and f'name = "{DISTRIBUTION}"' in project.read_text(encoding="utf-8"):
            return str(folder.parent)
    try:
        origin = json.loads(metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}")
        url = urlparse(str(origin["url"]))
        path = Path(url2pathname(url.path))
        return str(path) if url.scheme == "file" and path.exists() else UNKNOWN
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return UNKNOWN

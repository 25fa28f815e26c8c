"""Choice of a lowering: whether the scans of a bundle run on a native library of this machine, and on which one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from evm_deploy._util.files import cache_folder
from evm_deploy._util.text import one_of
from evm_deploy.bundle.bundle import Bundle
from evm_deploy.bundle.manifest import Decision
from evm_deploy.errors import BundleError, ToolchainError, UsageError
from evm_deploy.runtimes.info import NativeKernels, RuntimeInfo
from evm_deploy.toolchain.compile import compiled_once
from evm_deploy.toolchain.platforms import host_platform


def lowering_here(bundle: Bundle, target: RuntimeInfo, scan: str, settings: Any = None) -> tuple[Path | None, Decision]:
    """Choose how the scans of a bundle run on this machine. Returns the native library, None for portable, and why.

    scan: as in `load`. settings: of the runtime; where they leave no place for native kernels (`native_kernels`), auto
    is portable. Raises UsageError for a lowering that the bundle does not have, ToolchainError for a missing library,
    BundleError for native scans of a target without native kernels.
    """
    one_of("scan", scan, ("auto", "plugin", "bundled", "portable"))
    modes = bundle.manifest.scan["value"].split("+")
    if scan == "portable" and "portable" not in modes:
        raise UsageError(
            "portable scans are not available: the bundle has native nodes only", "export it with --scan portable"
        )
    if "aot" in modes:
        return None, Decision("aot", "the kernel is inside the engine")
    if scan == "portable" or "plugin" not in modes:
        if scan in ("plugin", "bundled"):
            raise UsageError(
                "native kernels are not available: the bundle was exported with portable scans",
                "export it with --scan auto",
            )
        reason = "as requested" if scan == "portable" else "the bundle has portable scans only"
        return None, Decision("portable", reason)
    if scan == "auto" and "portable" in modes and not getattr(settings, "native_kernels", True):
        return None, Decision("portable", "the chosen processors run no native kernels")
    kernels = _kernels(bundle, target)
    plugins, host = bundle.manifest.plugins, host_platform()
    if scan == "bundled":
        if host not in plugins:
            raise UsageError(
                f"no native library for {host} in the bundle; available: {', '.join(plugins) or 'none'}",
                "export it with --platform",
            )
        own = _library(bundle, plugins[host])
        return own, Decision("plugin", f"native kernel, {kernels.isa(own)}, from the bundle ({host})")
    try:
        plugin = kernels.installed()
    except ToolchainError as error:
        reason = error.args[0]
        if host in plugins:  # a library is a program: it runs only if the user asks for it
            reason += "; the bundle contains a library for this platform: use scan 'bundled' to trust and run it"
        elif plugins:
            reason += f"; the libraries in the bundle are for {', '.join(plugins)}, this machine is {host}"
        if scan == "plugin" or "portable" not in modes:
            raise ToolchainError(reason, error.hint) from error
        return None, Decision("portable", reason)
    return plugin, Decision("plugin", f"native kernel, {kernels.isa(plugin)}, installed")


def _library(bundle: Bundle, name: str) -> Path:
    """Return the path to load a library of the bundle from.

    Windows does not delete a loaded library. So one that was unpacked from a zip is loaded from a copy in the cache,
    and the temporary folder can be deleted.
    """
    library = bundle.path / name
    if sys.platform != "win32" or not bundle.unpacked:
        return library
    kept = cache_folder() / "plugins" / bundle.manifest.files[name]["sha256"] / library.name
    return compiled_once(kept, lambda work: Path(shutil.copy(library, work)))


def _kernels(bundle: Bundle, target: RuntimeInfo) -> NativeKernels:
    if not target.kernels:
        raise BundleError(
            f"bundle {bundle.path} needs a native kernel, but target {target.name!r} has none", "export it again"
        )
    return target.kernels

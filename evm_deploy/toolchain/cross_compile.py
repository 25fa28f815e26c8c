"""Native libraries for the platforms of `--platform`, compiled with the `ziglang` package and cached."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from evm_deploy._util.files import cache_folder
from evm_deploy.errors import ToolchainError
from evm_deploy.toolchain.compile import Compiler, Recipe, compiled_once, read_recipe
from evm_deploy.toolchain.platforms import PLATFORMS, Platform

# -s: no symbols but the exported ones. -nostdlib++: the C++ runtime is not needed, and must not be.
LINK = ("-shared", "-s", "-nostdlib++")
# The same bytes everywhere: no time of compilation in a DLL, no folder of compilation as the name of a dylib.
REPRODUCIBLE = {".so": (), ".dll": ("-Wl,-Brepro",), ".dylib": ("-Wl,-install_name,@rpath/{name}",)}


def zig_version() -> str:
    """Version of the installed ziglang. Raises ToolchainError where there is none."""
    if find_spec("ziglang") is None:
        raise ToolchainError(
            "--platform compiles the native library with the package ziglang, which is not installed",
            "pip install 'evm-deploy[cross]'",
        )
    return metadata.version("ziglang")


def library(runtime: str, platform: str) -> Path:
    """The library of `runtime` (`onnxruntime`) for a platform, from the cache, else compiled into it: 1-2 minutes once.

    Cached by sources, flags and ziglang version; a damaged file is compiled again. Raises ToolchainError.
    """

    def compile_(work: Path) -> Path:
        return _compile(runtime, PLATFORMS[platform], read_recipe(), work, path.name)

    path = cached_path(runtime, platform)
    return compiled_once(path, compile_)


def cached_path(runtime: str, platform: str) -> Path:
    """Where the library of `runtime` for a platform is, once compiled from the sources that are here."""
    known = PLATFORMS[platform]
    return cache_folder() / "plugins" / _key() / platform / f"evm_{runtime}{known.suffix}"


def zig_compiler(target: str, architecture: str, cache: Path) -> Compiler:
    """ziglang for one of its targets, which caches in the folder `cache`. Keep that for no other day: ziglang 0.17.1
    links what was changed there.
    """
    zig_version()
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    command = (sys.executable, "-m", "ziglang", "c++", "-target", target)
    return Compiler(command, architecture, environment)


def _compile(runtime: str, platform: Platform, recipe: Recipe, work: Path, name: str) -> Path:
    compiler = zig_compiler(platform.zig, platform.architecture, work / "zig")
    sources = [*recipe.words["scan_sources"], *recipe.words[f"{runtime}_sources"]]
    link = [*LINK, *(flag.format(name=name) for flag in REPRODUCIBLE[platform.suffix])]
    compiler.run(*link, *compiler.objects(recipe, sources, work), "-o", work / name)
    return work / name


def _key() -> str:
    """Everything that decides the bytes of a library, but for the platform."""
    return read_recipe().digest(f"{zig_version()} {LINK} {REPRODUCIBLE} {sorted(PLATFORMS.items())}")
